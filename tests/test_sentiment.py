"""Chapter 6's sentiment folder: its two data sets, every model through the command line, the table."""

import hashlib
import io
import json
import random
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from llm_shared import resources
from llm_shared.resources import Download
from llm_shared.results import with_results
import pytest
import torch
from samples import ROOT, one_line

FOLDER = ROOT / "ch06/03_bonus_imdb-classification"
SCRIPT = FOLDER / "sentiment.py"
REPEATED, LEAKED = "A wonderful film, again and again.", "A wonderful film that is in both parts."


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def folder(monkeypatch):
    """The folder's modules, imported; nothing of them stays."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(resources, "DOWNLOADS", dict(resources.DOWNLOADS))
    names = ("sentiment", "reviews", "models")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)  # the benchmarks have a module models too
    import sentiment

    yield sentiment
    for name in names:
        sys.modules.pop(name, None)


def made_reviews(n=60):
    """Return {name: text} as in the archive: a word decides, the others say nothing."""
    rng = random.Random(0)
    filler = "the film has a plot and some actors in a house by the sea at night".split()
    found = {}
    for part in ("train", "test"):
        for i in range(n):
            for kind, word, stars in (("pos", "wonderful", 7 + i % 4), ("neg", "dreadful", 1 + i % 4)):
                words = rng.choices(filler, k=8) + [part, str(i), kind[::-1]]
                found[f"aclImdb/{part}/{kind}/{i}_{stars}.txt"] = f"{word} film<br /><br />{' '.join(words)} {word}"
    found |= {"aclImdb/train/pos/1000_10.txt": REPEATED, "aclImdb/train/pos/1001_9.txt": REPEATED}
    found |= {"aclImdb/train/pos/1002_10.txt": LEAKED, "aclImdb/test/pos/1002_10.txt": LEAKED}
    found |= {f"aclImdb/train/unsup/{i}_0.txt": "nobody knows" for i in range(3)}
    return found | {"aclImdb/README": "a list", "aclImdb/imdb.vocab": "the", "aclImdb/train/urls_pos.txt": "http"}


def archived(texts, link=None):
    """Return the bytes of a .tar.gz with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("aclImdb", "aclImdb/train", "aclImdb/train/pos"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, text in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        if link:
            info = tarfile.TarInfo("aclImdb/train/pos/5000_9.txt")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def publish(folder, tmp_path, monkeypatch):
    """publish(content): a server on this machine has this archive, whose sha256 is the pinned one."""
    import reviews

    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.delenv("LLM_OFFLINE", raising=False)
    monkeypatch.setattr(resources, "CACHE", tmp_path / "cache")

    def put(content, sha256=None):
        (tmp_path / "web" / reviews.IMDB).write_bytes(content)
        url = f"http://127.0.0.1:{server.server_port}/{reviews.IMDB}"
        resources.DOWNLOADS[reviews.IMDB] = Download(url, sha256 or hashlib.sha256(content).hexdigest())
        return reviews

    monkeypatch.setattr(reviews, "DOWNLOADS", resources.DOWNLOADS)
    yield put
    server.shutdown()
    server.server_close()


def test_snippets(folder):
    import gzip

    import reviews

    sha256 = hashlib.sha256(gzip.decompress(reviews.SNIPPETS.read_bytes())).hexdigest()
    assert sha256 == "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e"
    for name in ("README.md", "README.en.md"):
        assert sha256 in (FOLDER / name).read_text(encoding="utf-8")
    parts, again = reviews.read_snippets(), reviews.read_snippets()
    assert all(part.equals(same) for part, same in zip(parts, again, strict=True))
    assert [len(part) for part in parts] == [7048, 1008, 2014]
    texts = [text for part in parts for text in part.text]
    assert len(set(texts)) == len(texts) == 10_070
    labels = {text: label for part in parts for text, label in zip(part.text, part.label, strict=True)}
    assert labels["A real snooze."] == 0 and labels["Effective but too tepid biopic"] == 0
    assert labels["If you sometimes like to go to the movies to have fun, Wasabi is a good place to start."] == 1
    assert "Alternately frustrating and rewarding." not in labels  # its mean rating is -0.1


def test_imdb_keeps_its_official_split(publish):
    texts = made_reviews()
    reviews = publish(archived(texts))
    train, val, test = reviews.read_imdb()
    assert (len(train), len(val), len(test)) == (109, 12, 121)  # 121 of train are distinct and not in test
    clean = {name: text.replace("<br />", " ") for name, text in texts.items()}
    official = {text for name, text in clean.items() if name.startswith(("aclImdb/test/pos", "aclImdb/test/neg"))}
    assert set(test.text) == official
    assert not set(train.text) & set(test.text) and not set(val.text) & {*train.text, *test.text}
    for part, folder_name in ((train, "train"), (val, "train"), (test, "test")):
        for text, label in zip(part.text, part.label, strict=True):
            kinds = {
                name.split("/")[2] for name, other in clean.items() if other == text and f"/{folder_name}/" in name
            }
            assert kinds == {"pos" if label else "neg"}
    assert "nobody knows" not in {*train.text, *val.text, *test.text}
    assert val.label.nunique() == 2 and reviews.read_imdb()[1].equals(val)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"../outside.txt": "x"}, "does not belong there"),
        ({"aclImdb/train/pos/../../../outside.txt": "x"}, "does not belong there"),
        ({"/outside.txt": "x"}, "does not belong there"),
        ({"other/README": "x"}, "does not belong there"),
        ({"aclImdb/train/pos/7_3.txt": "three stars, but positive"}, "no name of a review"),
        ({"aclImdb/test/neg/notes.txt": "x"}, "no name of a review"),
        ("/etc/passwd", "does not belong there"),
    ],
)
def test_strange_members_are_refused(publish, script_here, tmp_path, extra, message):
    link = extra if isinstance(extra, str) else None
    publish(archived(made_reviews(4) | ({} if link else extra), link))
    one_line(script_here(SCRIPT, "--data", "imdb", "--results", tmp_path / "r.json"), message)
    assert not (tmp_path / "r.json").exists() and not list(tmp_path.rglob("outside.txt"))


def test_damaged_archives(publish, script_here, tmp_path, monkeypatch):
    command = [SCRIPT, "--data", "imdb", "--results", tmp_path / "r.json"]
    whole = archived(made_reviews(4))
    reviews = publish(whole, sha256="0" * 64)
    one_line(script_here(*command), "not the expected one")
    wrong_checksum = whole[:-8] + bytes(4) + whole[-4:]
    for damaged in (whole[: len(whole) // 2], whole[:-4], b"no archive", whole[:200] + bytes(50), wrong_checksum):
        publish(damaged)
        one_line(script_here(*command), "could not be read")
        (resources.CACHE / reviews.IMDB).unlink()
    publish(archived({name: text for name, text in made_reviews(4).items() if "test/neg" not in name}))
    one_line(script_here(*command), "lacks positive or negative")
    publish(whole)  # but the cache holds the archive from before
    one_line(script_here(*command), "is not the expected file")
    (resources.CACHE / reviews.IMDB).unlink()
    monkeypatch.setenv("LLM_OFFLINE", "1")
    one_line(script_here(*command), "LLM_OFFLINE=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data imbd", "there are snippets, imdb"),
        ("--model bert", "there are dummy, bow, tfidf, gpt, encoder"),
        ("--model gpt --max-length 257", "at most 256 tokens"),
        ("--model gpt --gpt nowhere", "nowhere"),
        ("--model encoder --encoder nobody/nothing", "no encoder 'nobody/nothing'"),
    ],
)
def test_bad_options(folder, script_here, tmp_path, words, message):
    one_line(script_here(SCRIPT, "--results", tmp_path / "r.json", *words.split()), message)
    (tmp_path / "r.json").write_text("[{", encoding="utf-8")
    one_line(script_here(SCRIPT, "--results", tmp_path / "r.json"), "is no JSON")


@pytest.fixture
def tiny_encoder(tmp_path):
    """A random BERT and a tokenizer of whole words, as transformers writes them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "film", "the", "a", "plot", "wonderful", "dreadful", "actors", "house", "sea", "night"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_every_model_runs_and_learns(publish, script_here, small_checkpoint, tiny_encoder, tmp_path):
    publish(archived(made_reviews()))
    results = tmp_path / "results.json"
    fast = "--max-length 24 --epochs 6 --lr 1e-2 --dtype float32 --seeds 1 --batch-size 8".split()
    for model, options in {
        "dummy": [],
        "bow": [],
        "tfidf": [],
        "gpt": ["--gpt", small_checkpoint, *fast],
        "gpt ": ["--gpt", small_checkpoint, *fast, "--random-weights"],
        "encoder": ["--encoder", tiny_encoder, *fast],
    }.items():
        command = [SCRIPT, "--data", "imdb", "--model", model.strip(), "--results", results, *options]
        done = script_here(*command)
        assert done.returncode == 0, done.stderr
        run = json.loads(results.read_text(encoding="utf-8"))[-1]
        assert run["settings"]["model"] == model.strip() and run["texts"] == [109, 12, 121]
        (tn, fp), (fn, tp) = run["confusion"]
        assert run["accuracy"] == pytest.approx((tn + tp) / 121) and tn + fp == 60 and fn + tp == 61
        assert f"test accuracy {run['accuracy']:.1%}" in done.stdout
        assert run["accuracy"] > 0.9 if model != "dummy" else 0.4 < run["accuracy"] < 0.6
    assert len(json.loads(results.read_text(encoding="utf-8"))) == 6


def test_runs_are_kept_and_not_repeated(publish, script_here, small_checkpoint, tmp_path):
    publish(archived(made_reviews(10)))
    results = tmp_path / "results.json"
    options = "--data imdb --model gpt --epochs 1 --max-length 24".split()
    command = [SCRIPT, *options, "--gpt", small_checkpoint]
    command += ["--results", results, "--dtype", "float32"]
    assert script_here(*command, "--seeds", 1).returncode == 0
    first = results.read_text(encoding="utf-8")
    assert script_here(*command, "--seeds", 1).returncode == 0 and results.read_text(encoding="utf-8") == first
    assert script_here(*command, "--seeds", 2).returncode == 0
    runs = json.loads(results.read_text(encoding="utf-8"))
    assert runs[:1] == json.loads(first) and [run["seed"] for run in runs] == [0, 1]
    assert script_here(*command, "--seeds", 1, "--train-texts", 9).returncode == 0
    last = json.loads(results.read_text(encoding="utf-8"))[-1]
    assert (last["seed"], last["texts"][0], last["settings"]["train_texts"]) == (0, 9, 9)
    results.write_text(json.dumps(runs[1:]), encoding="utf-8")  # seed 0 again, from nothing: the same
    script_here(*command, "--seeds", 1)
    assert json.loads(results.read_text(encoding="utf-8"))[-1]["confusion"] == runs[0]["confusion"]


def test_padding_does_not_change_an_encoders_answer(folder, tiny_encoder):
    import models
    import pandas as pd

    model = models.EncoderClassifier(tiny_encoder).eval()
    table = pd.DataFrame({"text": ["wonderful film", "the dreadful plot a house the sea night"], "label": [1, 0]})
    items = model.encode(table, 32)
    from llm_shared.classify import pad_batch

    with torch.no_grad():
        together = model(*pad_batch(items)[:2])
        alone = torch.cat([model(*pad_batch([item])[:2]) for item in items])
        theirs = model.encoder(**model.tokenizer(table.text.tolist(), padding=True, return_tensors="pt")).logits
    assert together.sub(alone).abs().max() < 1e-6 and together.sub(theirs).abs().max() < 1e-6


def test_the_best_epoch_is_kept(folder, monkeypatch, small_checkpoint):
    import models
    import pandas as pd

    accuracies, seen = iter([0.5, 0.9, 0.7]), {}

    def fake_train(model, optimizer, loader, val_loader, steps, on_eval, **options):
        for i in range(3):
            torch.nn.init.constant_(model.head.bias, i)
            on_eval([])

    def fake_predict(model, loader, dtype):
        seen["bias"] = model.head.bias[0].item()
        return torch.zeros(2, 2), torch.zeros(2).long()

    monkeypatch.setattr(models, "scores", lambda probs, labels: {"accuracy": next(accuracies)})
    monkeypatch.setattr(models, "train", fake_train)
    monkeypatch.setattr(models, "predict", fake_predict)
    args = folder.parse_args(["--model", "gpt", "--gpt", small_checkpoint, "--max-length", "8"])
    table = pd.DataFrame({"text": ["good", "bad"], "label": [1, 0]})
    models.fine_tune(args, [table] * 3, 0, torch.device("cpu"))
    assert seen["bias"] == 1


def test_table_equals_json(folder):
    runs = folder.read_results(FOLDER / "results.json")
    for language, name in enumerate(("README.en.md", "README.md")):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert with_results(text, folder.table(runs, language)) == text, "run sentiment.py --table"
    wanted = [folder.settings(folder.parse_args(words.split())) for words in folder.COMMANDS if '"' not in words]
    assert all(run["settings"] in wanted for run in runs)
    assert {run["settings"]["data"] for run in runs} == {"snippets"}  # nothing of the internet was measured here
    for run in runs:
        (tn, fp), (fn, tp) = run["confusion"]
        assert run["accuracy"] == pytest.approx((tn + tp) / run["texts"][2]) and tn + fp + fn + tp == run["texts"][2]
    by_row = [[run["accuracy"] for run in runs if run["settings"] == row] for row in wanted[:5]]
    dummy, bow, tfidf, mini, random_weights = by_row
    assert [len(row) for row in by_row] == [1, 1, 1, 3, 3]
    assert min(bow + tfidf) > max(mini) and max(dummy) < 0.5  # what the READMEs say in words
    assert 0.005 < sum(mini) / 3 - sum(random_weights) / 3 < 0.015
    assert "not measured here" in folder.table([], 0) and "%" not in folder.table([], 0)
