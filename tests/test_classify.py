"""The classifier: data without leaks, padding that changes nothing, scores against scikit-learn, bad input."""

import math
import zipfile
from dataclasses import replace

from llm_shared import resources
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
from llm_shared.download import hash_file
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.training import make_optimizer, train
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score

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


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """collection(lines): the archive of the whole collection, in the cache, holds these lines; return its path."""

    def put(lines):
        path = tmp_path / "sms-spam-collection.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "about")
            archive.writestr("SMSSpamCollection", lines.encode("utf-8"))
        monkeypatch.setitem(resources.DOWNLOADS, path.name, resources.Download("", hash_file(path)))
        return path

    monkeypatch.setattr(resources, "CACHE", tmp_path)
    return put


def test_the_whole_collection_is_read_as_it_is(collection):
    collection('ham\tHe said "yes\nspam\tWIN "now" £100\nham\tok ;)\nham\tok ;)\nspam\t"free\nham\tNA\nham\t7\n')
    table = read_messages("uci")
    assert table.text.tolist() == ['He said "yes', 'WIN "now" £100', "ok ;)", '"free', "NA", "7"]
    assert table.label.tolist() == [0, 1, 0, 1, 0, 0]


def test_a_damaged_collection_is_one_line(collection):
    path = collection("ham\tsee you\nspam\twin cash\n")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive", whole.replace(b"see", b"sea")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"sms-spam-collection\.zip is not the expected file .*: delete it"):
            read_messages("uci")


def written(tmp_path, content):
    path = tmp_path / "messages.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,label\nNA,0\nnull,1\nNone,0\nnan,0\nN/A,1\n", {"NA": 0, "null": 1, "None": 0, "nan": 0, "N/A": 1}),
        ("text,label\n123,0\n007,1\n1e5,0\nTrue,1\n", {"123": 0, "007": 1, "1e5": 0, "True": 1}),
        ("text,label\n123,0\n007,1\n", {"123": 0, "007": 1}),
        ("text,label\n1.50,0\n1.5,1\n", {"1.50": 0, "1.5": 1}),
        ("text,label\na,0.0\nb,1.0\n", {"a": 0, "b": 1}),
        ("text,label\na,False\nb,TRUE\n", {"a": 0, "b": 1}),
        ("text,label\na, 1\nb,0 \n", {"a": 1, "b": 0}),
        ('text,label\na,"1"\nb,"0"\n', {"a": 1, "b": 0}),
        ("text,label\na,ham\nb,spam\n", {"a": 0, "b": 1}),
        ("\ufefftext,label\r\na,0\r\nb,1\r\n", {"a": 0, "b": 1}),
        ("text,label\ra,0\rb,1\r", {"a": 0, "b": 1}),
        ("id,label,when,text\n1,0,2020,a\n2,1,2021,b\n", {"a": 0, "b": 1}),
        ('text,label\n"a, b",0\n"said ""no""",1\n"two\nlines",0\n', {"a, b": 0, 'said "no"': 1, "two\nlines": 0}),
        ("text,label\na,0\n\nb,1\na,0\n\n", {"a": 0, "b": 1}),
        ("text,label\n a ,0\nViệt,1\n", {" a ": 0, "Việt": 1}),
    ],
)
def test_what_is_read_is_what_the_file_says(tmp_path, capsys, content, expected):
    table = read_messages(written(tmp_path, content))
    assert dict(zip(table.text, table.label, strict=True)) == expected and len(table) == len(expected)
    assert table.label.dtype == "int64" and capsys.readouterr().out == ""


def test_rows_that_are_left_out_are_counted(tmp_path, capsys):
    path = written(tmp_path, f"text,label\na,0\nb,1\n  ,0\n,7\n{'x' * 1001},1\n\t,\n{'y' * 1000},1\n")
    assert read_messages(path).text.tolist() == ["a", "b", "y" * 1000]
    said = capsys.readouterr().out
    assert (
        said.endswith("messages.csv: 4 rows left out, empty or longer than 1000 characters\n") and said.count("\n") == 1
    )
    read_messages()
    assert capsys.readouterr().out == "bundled: 7 rows left out, empty or longer than 1000 characters\n"


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
    train = split(TABLE)[0]
    assert not train.label.is_monotonic_increasing and not train.index.is_monotonic_increasing


def labelled(*counts):
    labels = [label for label, n in enumerate(counts) for _ in range(n)]
    return pd.DataFrame({"text": [f"message {i}" for i in range(len(labels))], "label": labels})


@pytest.mark.parametrize("counts", [(40, 20), (1000, 7), (7, 7), (93, 11, 30), (12, 0)])
@pytest.mark.parametrize("shares", [(0.7, 0.1), (0.6, 0), (0.9, 0.1), (0.5, 0.25)])
def test_each_label_has_the_same_share_of_each_part(counts, shares):
    if min(filter(None, counts)) < 10 and shares == (0.9, 0.1):
        return  # too rare for a tenth
    for seed in range(5):
        parts = split(labelled(*counts), seed, *shares)
        assert sorted(text for part in parts for text in part.text) == sorted(labelled(*counts).text)
        for part, share in zip(parts, (*shares, 1 - sum(shares)), strict=True):
            for label, n in enumerate(counts):
                assert abs((part.label == label).sum() - share * n) < 1


@pytest.mark.parametrize(
    ("counts", "shares"),
    [((50, 3), (0.7, 0.1)), ((1, 1), (0.7, 0.1)), ((), (0.7, 0.1)), ((99, 1), (0.8, 0)), ((9, 9), (1.5, 0.1)),
     ((9, 9), (-0.1, 0.5)), ((9, 9), (float("nan"), 0.1))],
)  # fmt: skip
def test_a_part_without_a_label_is_refused(counts, shares):
    with pytest.raises(ValueError, match="too few rows to have each label in each part") as caught:
        split(labelled(*counts), 0, *shares)
    assert str(dict(enumerate(counts))) in str(caught.value)


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
    with pytest.raises(ValueError, match=r"no layer is called 'gpt\.block'; there are all, gpt, gpt\.tok_emb, .*head"):
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
        ("", "with the columns text and label: No columns"),
        ("text,label\n", r"labels must be 0 and 1, and both occur; there are \[\]"),
        ("text,label\na,0\nb,0\n", r"labels must be 0 and 1, and both occur; there are \[0\]"),
        (f"text,label\n{'x' * 2000},1\nb,0\n", r"labels must be 0 and 1, and both occur; there are \[0\]"),
        ("text,label\n ,1\nb,0\n", r"labels must be 0 and 1, and both occur; there are \[0\]"),
        ("text,label\na,0\nb,2\n", "row 3: '2'; write 0 or 1"),
        ("text,label\na,0.5\nb,1\n", "row 2: '0.5'; write 0 or 1"),
        ("text,label\na,no\nb,yes\n", "row 2: 'no'; write 0 or 1"),
        ("text,label\na,0\nb,\nc,1\n", "row 3: ''; write 0 or 1"),
        ("text,label\na,0\nb\nc,1\n", "row 3: ''; write 0 or 1"),
        ("text,label\na,0\nb,1\na,1\n", "row 2: '0'; write 0 or 1, for the same text the same"),
        ("message,label\na,0\nb,1\n", r"the head line is \['message', 'label'\]"),
        ("text;label\na;0\nb;1\n", r"the head line is \['text;label'\]"),
        ("Text,Label\na,0\nb,1\n", r"the head line is \['Text', 'Label'\]"),
        ("text,label\nno, thanks,0\nyes, now,1\n", r"and each row needs as many cells"),
        ("label,text\n0,no, thanks\n1,yes, now\n", r"and each row needs as many cells"),
        ("text,label\na,0\nb, or c,1\n", "Expected 2 fields in line 3, saw 3"),
        ('text,label\n"a,0\nb,1\n', "EOF inside string starting at row 1"),
        (b"text,label\n\xff\xfe,0\n", "no CSV in UTF-8"),
        ("text,label\na,0\nb,1\n".encode("utf-16"), "no CSV in UTF-8"),
        ("text,label\na,0\nb,1\n".encode("utf-16-le"), "no CSV in UTF-8"),
    ],
)
def test_bad_tables_get_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_messages(written(tmp_path, content))
    assert "\n" not in str(caught.value) and "messages.csv" in str(caught.value)


def test_a_table_that_is_not_there_is_said_first(tmp_path):
    with pytest.raises(OSError, match="No such file.*nowhere"):
        read_messages(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("items", "width"),
    [([], None), ([([], 0)], None), ([([5], 0), ([], 1)], None), ([([5, 6, 7], 0)], 2)],
)
def test_rows_that_make_no_batch_are_refused(items, width):
    with pytest.raises(
        ValueError, match=r"a batch takes no row without ids and none wider than|max\(\) arg is an empty sequence"
    ):
        pad_batch(items, width=width)


def test_scores_of_one_label_of_three_and_of_none():
    probs = torch.eye(3)[[0, 1, 2, 1]]
    assert scores(probs, torch.tensor([0, 1, 1, 1])) == {
        "accuracy": 0.75, "confusion": [[1, 0, 0], [0, 2, 1], [0, 0, 0]], "precision": 1, "recall": pytest.approx(2 / 3)
    }  # fmt: skip
    one = scores(torch.eye(2)[[0, 0]], torch.tensor([0, 0]))
    assert one["accuracy"] == 1 and math.isnan(one["precision"]) and math.isnan(one["recall"])
    none = scores(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    assert math.isnan(none["accuracy"]) and none["confusion"] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0 and .* must be at least 1"),
        ({"lr": 0}, "lr=0 a number above 0"),
        ({"lr": -1e-3}, "lr=-0.001 a number above 0"),
        ({"lr": float("nan")}, "lr=nan a number above 0"),
        ({"lr": float("inf")}, "lr=inf a number above 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"max_length": 33}, "33 tokens do not fit the context of 32"),
    ],
)
def test_settings_that_train_nothing_are_refused(model, options, message):
    table = TABLE.assign(text=TABLE.text + " and so on" * 20)
    with pytest.raises(ValueError, match=message) as caught:
        finetune_classifier(model, gpt2_tokenizer(), table, **options)
    assert "\n" not in str(caught.value)


def test_messages_that_are_no_messages(model):
    with pytest.raises(ValueError, match=r"\d+ tokens do not fit the context of 32"):
        classify(model, gpt2_tokenizer(), "spam " * 20_000)
    with pytest.raises(ValueError, match="a batch takes no row without ids"):
        classify(model, gpt2_tokenizer(), "")
    with pytest.raises(ValueError, match=r"too few rows to have each label in each part: \{0: 6, 1: 3\}"):
        finetune_classifier(model, gpt2_tokenizer(), TABLE[:9])
