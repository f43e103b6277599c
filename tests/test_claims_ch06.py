"""What chapter 6 claims, with other seeds, widths and messages than its notebooks'."""

import csv
import io
import math
import unicodedata

from llm_shared.classify import (
    LONGEST,
    GPTClassifier,
    balance,
    classification_loss,
    classify,
    create_message_loader,
    encode_messages,
    pad_batch,
    predict,
    read_messages,
    scores,
    split,
    train_only,
)
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.loss import evaluate
from llm_shared.resources import fetch
from llm_shared.tokenizer import gpt2_tokenizer
from llm_shared.weights import load_pretrained
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

SEEDS = pytest.mark.parametrize("seed", [606, 1789])
TINY = GPTConfig(vocab_size=60, context_length=24, n_embd=32, n_head=4, n_layer=3)


@pytest.fixture(scope="module")
def raw():
    return pd.read_csv(fetch("sms-spam.csv"))


@pytest.fixture(scope="module")
def messages():
    return read_messages()


@pytest.fixture(scope="module")
def vietnamese():
    return read_messages(fetch("vietnamese-sms.csv"))


@pytest.fixture(scope="module")
def gpt():
    return load_pretrained("mini").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_tokenizer()


def tiny(seed, layers=3):
    """A small classifier that is far from indifferent."""
    torch.manual_seed(seed)
    model = GPTClassifier(GPTModel(GPTConfig(**{**TINY.__dict__, "n_layer": layers}))).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model


# 6.2


@SEEDS
def test_splitting_first_leaks_and_a_parrot_profits(raw, seed):
    def parts(table):
        return split(table.rename(columns={"spam": "label"}), seed, train=0.8, val=0)[::2]

    def caught(table):
        learned, tested = parts(table)
        says = tested.text.map(dict(zip(learned.text, learned.label, strict=True))).fillna(0)
        return says[tested.label == 1].mean()

    learned, tested = parts(raw)
    seen = tested.text.isin(learned.text)
    assert 0.05 < seen.mean() < 0.15 and seen[tested.label == 1].mean() > 0.1
    assert caught(raw) > 0.1 and caught(raw.drop_duplicates("text")) == 0


def test_one_row_is_hundreds_of_messages(raw):
    lengths = raw.text.str.len()
    glued = raw.text[lengths.idxmax()]
    assert lengths.max() > 28_000 and raw.spam[lengths.idxmax()] == 0
    assert glued.count("\nham\t") == 268 and glued.count("\nspam\t") == 48
    assert 900 < lengths[lengths <= LONGEST].max() <= LONGEST


@pytest.mark.parametrize("n", [3, 50])
def test_a_lost_quotation_mark_glues_lines(n):
    lines = 'ham\t"Happiness\n' + "spam\tWIN a prize now\n" * n + 'ham\t"See you\nham\tOk lar\n'
    rows = [
        len(pd.read_csv(io.StringIO(lines), sep="\t", names=["label", "text"], quoting=quoting))
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)
    ]
    assert rows == [2, n + 3]


def test_never_saying_spam_is_nearly_always_right(raw, messages):
    assert (raw.spam == 0).mean() == pytest.approx(0.868, abs=0.0006)
    assert (messages.label == 0).mean() == pytest.approx(0.874, abs=0.0006)
    labels = torch.tensor(messages.label.tolist())
    found = scores(F.one_hot(labels * 0, 2).double(), labels)
    assert found["accuracy"] > 0.87 and found["recall"] == 0 and math.isnan(found["precision"])


@SEEDS
def test_cutting_without_shuffling_gives_a_test_set_of_spam_only(messages, seed):
    rows = balance(messages, seed).sort_values("label")
    assert set(rows[round(0.8 * len(rows)) :].label) == {1}
    assert split(rows, seed)[2].label.mean() == 0.5


# 6.3 and exercise 6.1


@SEEDS
@torch.no_grad()
def test_the_answer_is_the_same_at_any_width_only_where_the_last_real_token_is_read(gpt, tokenizer, messages, seed):
    torch.manual_seed(seed)
    model = GPTClassifier(gpt).eval()
    items = encode_messages(messages.sample(6, random_state=seed), tokenizer, 40)
    alone = torch.cat([model(*pad_batch([item])[:2]) for item in items])
    for width in (41, 77, gpt.config.context_length):
        ids, lengths, _ = pad_batch(items, width=width)
        hidden = gpt.hidden(ids)
        assert torch.allclose(model(ids, lengths), alone, atol=1e-4)
        left = torch.stack([row.roll(width - n.item()) for row, n in zip(ids, lengths, strict=True)])
        for wrong in (hidden[:, -1], hidden.mean(1), gpt.hidden(left)[:, -1]):
            assert (model.head(wrong) - alone).abs().max() > 0.02


@SEEDS
def test_padding_costs_nothing_but_time_and_gradients_do_not_see_it(seed):
    model, found = tiny(seed), []
    items = [([7, 8, 9], 0), ([10], 1), (list(range(12)), 1)]
    for width in (12, 24):
        model.zero_grad()
        classification_loss(model, *pad_batch(items, 0, width)).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*found, atol=1e-4)


# 6.4 and exercise 6.3


@SEEDS
@pytest.mark.parametrize("place", [0, 5, 11])
@torch.no_grad()
def test_a_token_moves_no_position_before_it(gpt, seed, place):
    torch.manual_seed(seed)
    ids = torch.randint(50256, (1, 12))
    changed = ids.clone()
    changed[0, place] = (ids[0, place] + 1000) % 50256
    moved = (gpt.hidden(changed) - gpt.hidden(ids))[0].norm(dim=-1) > 1e-3
    assert moved.tolist() == [i >= place for i in range(12)]


@SEEDS
@torch.no_grad()
def test_reading_the_first_position_is_reading_one_token(seed):
    model = tiny(seed)
    ids = torch.randint(60, (8, 20))
    first = model(ids, torch.ones(8, dtype=torch.long))
    assert torch.allclose(first, model(ids[:, :1], torch.ones(8, dtype=torch.long)), atol=1e-5)
    others = torch.cat([ids[:, :1], torch.randint(60, (8, 19))], dim=1)
    assert torch.allclose(first, model(others, torch.ones(8, dtype=torch.long)), atol=1e-5)
    full = torch.full((8,), 20)
    assert (model(ids, full) - model(others, full)).abs().amax(1).min() > 1e-3


@SEEDS
def test_an_untrained_head_has_learned_nothing(gpt, tokenizer, messages, seed):
    rows = balance(messages, seed)[:60]
    loader = create_message_loader(encode_messages(rows, tokenizer, 24), 30, shuffle=False)
    torch.manual_seed(seed)
    heads = [GPTClassifier(gpt) for _ in range(4)]
    assert evaluate(heads[0], loader, classification_loss) == pytest.approx(math.log(2), abs=0.3)
    accuracy = [scores(*predict(model, loader))["accuracy"] for model in heads]
    assert 0.2 < sum(accuracy) / 4 < 0.8


# 6.5


def test_accuracy_has_no_gradient():
    logits = torch.randn(5, 2, requires_grad=True)
    labels = torch.randint(2, (5,))
    assert not (logits.argmax(-1) == labels).float().mean().requires_grad
    assert F.cross_entropy(logits, labels).requires_grad


def test_the_beginning_of_a_name_is_no_name():
    model = tiny(0, layers=12)
    by_beginning = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("gpt.blocks.1")}
    train_only(model, ["gpt.blocks.1"])
    assert by_beginning == {"1", "10", "11"}
    assert {name.split(".")[2] for name, w in model.named_parameters() if w.requires_grad} == {"1"}
    with pytest.raises(ValueError, match="no layer is called"):
        train_only(model, ["gpt.block.1"])


# 6.6 and exercise 6.5


@SEEDS
@pytest.mark.parametrize("share", [0.126, 0.03])
def test_on_the_street_recall_stays_and_precision_falls(seed, share):
    generator = torch.Generator().manual_seed(seed)

    def judged(share, n=40_000):
        labels = (torch.rand(n, generator=generator) < share).long()
        p = (torch.randn(n, generator=generator) + 3 * labels - 1.5).sigmoid()
        return scores(torch.stack([1 - p, p], 1), labels)

    balanced, street = judged(0.5), judged(share)
    assert abs(balanced["recall"] - street["recall"]) < 0.03
    assert street["precision"] < balanced["precision"] - 0.2


@SEEDS
def test_the_cheapest_threshold_follows_the_price_and_the_share_of_spam(seed):
    generator, n, share = torch.Generator().manual_seed(seed), 100_000, 0.1
    balanced = torch.rand(n, generator=generator)  # a calibrated classifier's answers where half is spam
    labels = torch.rand(n, generator=generator) < balanced

    def cheapest(p, labels, weight):
        grid = torch.linspace(0.8, 0.999, 100)
        costs = [
            10 * (weight * ((p >= t) & ~labels)).sum().item() + (weight * ((p < t) & labels)).sum().item() for t in grid
        ]
        return grid[costs.index(min(costs))].item()

    assert cheapest(balanced, labels, torch.ones(n)) == pytest.approx(10 / 11, abs=0.03)
    odds = share / (1 - share)
    street = torch.where(labels, odds, 1.0)  # the same messages, spam as rare as on the street
    assert cheapest(balanced, labels, street) == pytest.approx(10 / (10 + odds), abs=0.01)
    corrected = balanced * odds / (balanced * odds + 1 - balanced)
    assert cheapest(corrected, labels, street) == pytest.approx(10 / 11, abs=0.06)


# 6.8


@SEEDS
def test_what_is_cut_off_is_not_read(gpt, tokenizer, seed):
    torch.manual_seed(seed)
    model = GPTClassifier(gpt)
    friendly = "It was lovely to see you all, and the garden was beautiful. " * 6
    rows = pd.DataFrame({"text": [friendly, friendly + "WIN £500 now"], "label": [0, 1]})
    cut, whole = encode_messages(rows, tokenizer, 64), encode_messages(rows, tokenizer, 256)
    assert cut[0][0] == cut[1][0] and whole[0][0] != whole[1][0]
    assert classify(model, tokenizer, rows.text[0]) != classify(model, tokenizer, rows.text[1])


# 6.9 and exercise 6.4


def plain(text):
    parts = unicodedata.normalize("NFD", text.replace("đ", "d").replace("Đ", "D"))
    return "".join(character for character in parts if not unicodedata.combining(character))


def test_vietnamese_costs_more_than_twice_the_tokens_of_a_word(messages, vietnamese, tokenizer):
    def per_word(texts):
        return sum(len(tokenizer.encode_ordinary(text)) for text in texts) / texts.str.split().str.len().sum()

    english, marked, unmarked = map(per_word, (messages.text, vietnamese.text, vietnamese.text.map(plain)))
    assert marked > 2 * english and english < unmarked < 0.75 * marked


def test_the_vietnamese_messages_are_what_the_text_says(vietnamese):
    assert len(vietnamese) >= 200 and vietnamese.label.mean() == 0.5
    assert vietnamese.text.map(lambda text: unicodedata.is_normalized("NFC", text)).all()
    assert 0.1 < vietnamese.text.map(str.isascii).mean() < 0.5
