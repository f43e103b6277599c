"""The classifier: data without leaks, padding that changes nothing, scores against scikit-learn, bad input."""

import io
import zipfile
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score

from llm_shared import classify as module
from llm_shared.classify import (
    GPTClassifier,
    balance,
    classification_loss,
    classify,
    create_message_loader,
    encode_messages,
    finetune_classifier,
    load_classifier,
    pad_batch,
    predict,
    read_messages,
    save_classifier,
    scores,
    split,
    train_only,
)
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.training import make_optimizer, train

CONFIG = GPTConfig(vocab_size=50257, context_length=32, n_embd=16, n_head=2, n_layer=2)
TABLE = pd.DataFrame({"text": [f"message {i} {'win cash' if i % 3 == 0 else 'see you'}" for i in range(60)]})
TABLE["label"] = [int(i % 3 == 0) for i in range(60)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPTClassifier(GPTModel(CONFIG))


def test_bundled_messages_are_distinct_and_no_longer_glued():
    table = read_messages()
    assert list(table) == ["text", "label"] and set(table.label) == {0, 1}
    assert not table.text.duplicated().any() and table.text.str.len().max() <= 1000
    assert len(table) > 4500 and 550 < table.label.sum() < 600


def test_the_whole_collection_is_read_without_quoting(tmp_path, monkeypatch):
    lines = 'ham\tHe said "yes\nspam\tWIN "now" £100\nham\tok ;)\nham\tok ;)\nspam\t"free\n'
    with zipfile.ZipFile(tmp_path / "sms.zip", "w") as archive:
        archive.writestr("SMSSpamCollection", lines.encode("utf-8"))
    monkeypatch.setattr(module, "fetch", lambda name: tmp_path / "sms.zip")
    table = read_messages("uci")
    assert table.text.tolist() == ['He said "yes', 'WIN "now" £100', "ok ;)", '"free']
    assert table.label.tolist() == [0, 1, 0, 1]


def test_no_message_is_in_two_parts():
    for seed in range(3):
        for table in (TABLE, balance(TABLE, seed)):
            parts = split(table, seed)
            assert [len(part) for part in parts] == [
                round(0.7 * len(table)),
                round(0.1 * len(table)),
                round(0.2 * len(table)),
            ]
            texts = [text for part in parts for text in part.text]
            assert sorted(texts) == sorted(table.text)
    assert balance(TABLE).label.value_counts().to_dict() == {0: 20, 1: 20}
    assert split(TABLE, 1)[2].equals(split(TABLE, 1)[2]) and not split(TABLE, 1)[2].equals(split(TABLE, 2)[2])


def test_padding_changes_nothing(model):
    model.eval()
    rows = [([5, 6, 7], 0), ([8], 1), (list(range(20)), 1)]
    with torch.no_grad():
        one_by_one = torch.cat([model(*pad_batch([row])[:2]) for row in rows])
        for width in (20, 25, 32):
            for pad_id in (50256, 0, 123):
                ids, lengths, labels = pad_batch(rows, pad_id, width)
                assert ids.shape == (3, width) and lengths.tolist() == [3, 1, 20] and labels.tolist() == [0, 1, 1]
                assert torch.allclose(model(ids, lengths), one_by_one, atol=1e-5)


def test_reading_the_last_position_instead_would_depend_on_padding(model):
    model.eval()
    with torch.no_grad():
        short, long = (model(pad_batch([([5, 6, 7], 0)], width=width)[0], torch.tensor([width])) for width in (3, 20))
    assert not torch.allclose(short, long, atol=1e-4)


def test_batches_hold_each_message_once():
    items = encode_messages(TABLE, gpt2_tokenizer(), 4)
    loader = create_message_loader(items, 7, seed=3)
    assert sum(len(labels) for _, _, labels in loader) == 60
    assert all(ids.shape[1] == lengths.max() <= 4 for ids, lengths, _ in loader)
    assert encode_messages(pd.DataFrame({"text": [""], "label": [0]}), gpt2_tokenizer(), 4) == [([50256], 0)]


def test_scores_equal_scikit_learns():
    torch.manual_seed(0)
    probs, labels = torch.rand(200, 2), torch.randint(2, (200,))
    found, said = scores(probs, labels), probs.argmax(-1)
    assert found["confusion"] == confusion_matrix(labels, said).tolist()
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, said))
    assert found["precision"] == pytest.approx(precision_score(labels, said))
    assert found["recall"] == pytest.approx(recall_score(labels, said))
    never = scores(torch.tensor([[0.9, 0.1]]), torch.tensor([1]))
    assert never["accuracy"] == 0 and never["recall"] == 0 and never["precision"] != never["precision"]


def test_only_the_named_layers_learn(model):
    train_only(model, ["gpt.blocks.1", "gpt.ln_f", "head"])
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    loader = create_message_loader(encode_messages(TABLE, gpt2_tokenizer(), 16), 10)
    train(model, make_optimizer(model, 1e-2), loader, loader, 3, loss_fn=classification_loss)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith(("gpt.blocks.1.", "gpt.ln_f.", "head."))}
    train_only(model, ["all"])
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ValueError, match=r"no layer is called 'gpt\.block'; there are all, gpt\.tok_emb, .*head"):
        train_only(model, ["head", "gpt.block"])
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_easy_task_is_learned(model):
    _, found = finetune_classifier(model, gpt2_tokenizer(), TABLE, batch_size=8, epochs=8, lr=3e-3)
    assert found["accuracy"] == 1 and sum(map(sum, found["confusion"])) == 12
    spam, ham = (classify(model, gpt2_tokenizer(), text) for text in ("message win cash", "message see you"))
    assert spam[1] > 0.8 > 0.2 > ham[1] and sum(spam) == pytest.approx(1)


def test_a_model_with_a_vocabulary_of_its_own():
    tokenizer = BPETokenizer.train("".join(TABLE.text), 300)
    gpt = GPTModel(replace(CONFIG, vocab_size=tokenizer.n_vocab, context_length=64))
    _, found = finetune_classifier(GPTClassifier(gpt), tokenizer, TABLE, batch_size=8, epochs=1, max_length=64)
    assert sum(map(sum, found["confusion"])) == 12


def test_saved_and_loaded_it_says_the_same(model, tmp_path):
    save_classifier(tmp_path / "deep" / "spam.safetensors", model)
    again = load_classifier(tmp_path / "deep" / "spam.safetensors")
    loader = create_message_loader(encode_messages(TABLE, gpt2_tokenizer(), 16), 10, shuffle=False)
    assert torch.equal(predict(again, loader)[0], predict(model, loader)[0])
    path = tmp_path / "spam.safetensors"
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no classifier of this project"):
        load_classifier(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a CSV file in UTF-8 with the columns text and label"),
        ("text,label\n", "labels must be 0 and 1, and both occur; there are \\[\\]"),
        ("text,label\na,0\nb,0\n", "labels must be 0 and 1, and both occur; there are \\[0\\]"),
        ("text,label\na,0\nb,2\n", "labels must be 0 and 1"),
        ("text,label\na,ham\nb,spam\n", "labels must be 0 and 1"),
        ("message,label\na,0\nb,1\n", "with the columns text and label: .*text"),
        ('text,label\n"a,0\nb,1\n', "is not a CSV file"),
    ],
)
def test_bad_tables_get_one_line(tmp_path, content, message):
    path = tmp_path / "messages.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_messages(path)
    assert "\n" not in str(caught.value) and "messages.csv" in str(caught.value)


def test_other_bad_input(model, tmp_path):
    path = tmp_path / "messages.csv"
    path.write_bytes(io.BytesIO(b"text,label\n\xff\xfe,0\n").getvalue())
    with pytest.raises(ValueError, match="is not a CSV file in UTF-8"):
        read_messages(path)
    with pytest.raises(ValueError, match=r"the message has \d+ tokens; from 1 to 32 can be read: shorten it"):
        classify(model, gpt2_tokenizer(), "spam " * 20_000)
    with pytest.raises(ValueError, match="the message has 0 tokens"):
        classify(model, gpt2_tokenizer(), "")
