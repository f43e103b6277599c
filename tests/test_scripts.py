import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples import one_line

from llm_shared.checkpoint import load_model, newest_checkpoint, save_model
from llm_shared.classify import load_classifier
from llm_shared.gpt import CONFIGS, GPTConfig, GPTModel
from llm_shared.pretrain import PretrainSettings, pretrain
from llm_shared.resources import locked
from llm_shared.schedule import warmup_cosine
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer

TRAIN = "ch05/01_main-chapter-code/gpt_train.py"
GENERATE = "ch05/01_main-chapter-code/gpt_generate.py"
CLASSIFY = "ch06/01_main-chapter-code/gpt_class_finetune.py"
GPT = "ch04/01_main-chapter-code/gpt.py"
VIETNAMESE = "Điều 1. Bộ luật này quy định quyền và nghĩa vụ của cá nhân trong các quan hệ dân sự.\n" * 40
TINY = "--context-length 16 --batch-size 2 --steps 3 --eval-every 2 --warmup-steps 1".split()


@pytest.fixture
def vietnamese(tmp_path):
    (tmp_path / "luật.txt").write_text(VIETNAMESE, encoding="utf-8")
    BPETokenizer.train(VIETNAMESE, 300).save(tmp_path / "luật.bpe")
    return ["--data", tmp_path / "luật.txt", "--tokenizer", tmp_path / "luật.bpe"]


def test_train_resume_and_generate_on_vietnamese(script, script_here, vietnamese, tmp_path):
    out = tmp_path / "thư mục chạy"
    done = script(TRAIN, *TINY, *vietnamese, "--out", out)
    assert done.returncode == 0, done.stderr
    for said in ("validation loss", "unigram entropy", "bits per byte", "step 2:", "step 3:"):
        assert said in done.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert newest_checkpoint(out).name == "step-00000003"

    one_line(script_here(TRAIN, *TINY, *vietnamese, "--out", out), "already holds a run")
    assert script(TRAIN, *TINY, *vietnamese, "--out", out, "--resume").returncode == 0
    other = script_here(TRAIN, *TINY, *vietnamese, "--out", out, "--resume", "--lr", "0.5")
    one_line(other, "was made with lr=0.002")
    assert newest_checkpoint(out).name == "step-00000003"

    write = [GENERATE, "--checkpoint", out, "--prompt", "Điều 2", "--max-new-tokens", 40, "--temperature", 1]
    first, again = script(*write), script_here(*write)
    assert first.returncode == 0 and first.stdout.startswith("Điều 2")
    assert first.stdout == again.stdout != script_here(*write, "--seed", 7).stdout
    assert script_here(*write, "--prompt", "").returncode == 0
    one_line(script_here(*write, "--top-k", 0), "top_k at least 1")


@pytest.fixture
def tiny_run(vietnamese, tmp_path, monkeypatch):
    """Return a function that trains a very small model on the Vietnamese text, as gpt_train.py would."""
    monkeypatch.setitem(CONFIGS, "mini", GPTConfig(context_length=16, n_embd=16, n_head=2, n_layer=1))
    paths = {"data": str(vietnamese[1]), "tokenizer": str(vietnamese[3])}

    def run(resume=False, warmup_steps=1, **changed):
        settings = {**paths, "steps": 3, "eval_every": 2, "batch_size": 2, "dtype": "float32", **changed}
        pretrain(
            PretrainSettings(**settings), tmp_path / "run", warmup_cosine, "cpu", resume, warmup_steps=warmup_steps
        )
        return newest_checkpoint(tmp_path / "run")

    return run


def test_resume_and_what_has_changed(tiny_run, tmp_path, monkeypatch, capsys):
    tiny_run()
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    (tmp_path / "luật.txt").rename(tmp_path / "moved.txt")
    assert tiny_run(resume=True, data=tmp_path / "moved.txt").name == "step-00000003"  # the same text elsewhere
    for changed, message in (
        ({"warmup_steps": 2}, "made with warmup_steps=1: resume"),
        ({"steps": 9}, "made with steps=3 .the learning rate depends on them"),
        ({"accumulate": 2}, "made with accumulate=1"),
        ({"context_length": 8}, "made with context_length=None"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_run(resume=True, data=tmp_path / "moved.txt", **changed)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("llm_shared.pretrain.pick_dtype", lambda *_: torch.bfloat16)
        with pytest.raises(ValueError, match="dtype=float32 .add --dtype float32"):
            tiny_run(resume=True, data=tmp_path / "moved.txt", dtype="auto")
    with pytest.raises(ValueError, match="made with schedule=warmup_cosine"):
        settings = PretrainSettings(
            str(tmp_path / "moved.txt"),
            str(tmp_path / "luật.bpe"),
            steps=3,
            eval_every=2,
            batch_size=2,
            dtype="float32",
        )
        pretrain(settings, tmp_path / "run", resume=True)
    (tmp_path / "luật.txt").write_text(VIETNAMESE.replace("dân", "Dân"), encoding="utf-8")
    with pytest.raises(ValueError, match="the text or the tokenizer has changed"):
        tiny_run(resume=True)
    for path in sorted((tmp_path / "before").glob("step-*/*")):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "before")).read_bytes()


def test_two_runs_in_one_folder(tiny_run, script_here, tmp_path):
    tiny_run()
    with locked(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(OSError, match="another process is writing to .*run: wait for it, or choose another"):
                tiny_run(resume=resume)
        assert script_here(GENERATE, "--checkpoint", tmp_path / "run", "--max-new-tokens", 1).returncode == 0
    leftover = tmp_path / "run" / "step-00000002.99999999.tmp"
    leftover.mkdir()
    tiny_run(resume=True)
    assert not leftover.exists()


@pytest.mark.parametrize("first", [True, False])
def test_compiled_and_plain_runs_resume_each_other(tiny_run, tmp_path, monkeypatch, first):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("llm_shared.pretrain.write_sample", lambda *_: signal.raise_signal(signal.SIGINT))
        tiny_run(steps=4, compile=first)
    assert newest_checkpoint(tmp_path / "run").name == "step-00000002"
    assert tiny_run(resume=True, steps=4, compile=not first).name == "step-00000004"
    names = set(load_model(tmp_path / "run")[0].state_dict())
    assert len(compiled) == 1 and names == set(GPTModel(CONFIGS["mini"]).state_dict())


def test_a_schedule_of_numpys_numbers(tiny_run, tmp_path):
    """Its rates stand in the optimizer's state, which must be readable again."""
    numbers = {"steps": np.int64(3), "lr": np.float32(0.01), "warmup_steps": np.int64(1)}
    assert tiny_run(**numbers) == tiny_run(resume=True, **numbers)


def test_a_full_disk_at_the_end_does_not_hide_the_result(tiny_run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match=r"could not write .*loss\.png: .Errno 28. No space left"):
        tiny_run()
    assert "bits per byte" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("numpy.ndarray", "tokens"),
        ("llm_shared.checkpoint.torch.save", "could not save the checkpoint .*step-00000002.*the one before it"),
        ("safetensors.torch.save_file", "could not save the checkpoint .*model.safetensors"),
        ("llm_shared.tokenizer.Path.write_text", "could not save the checkpoint .*"),
    ],
)
def test_a_full_disk_in_a_run(tiny_run, tmp_path, monkeypatch, what, message):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if what == "numpy.ndarray":
        monkeypatch.setattr("llm_shared.data.np.array", lambda *_: SimpleNamespace(tofile=full))
    else:
        monkeypatch.setattr(what, full)
    with pytest.raises(OSError, match=message) as caught:
        tiny_run()
    assert "\n" not in str(caught.value) and "No space left" in str(caught.value)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "tokens.uint16"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2.5}, "steps must be at least 1, a whole number, not 2.5"),
        ({"steps": True}, "steps must be at least 1, a whole number, not True"),
        ({"batch_size": "4"}, "batch_size must be at least 1, a whole number, not '4'"),
        ({"seed": float("1e9999")}, "seed must be at least 0, a whole number, not inf"),
        ({"seed": 2**64}, "seed must be at least 0"),
        ({"eval_every": None}, "eval_every must be at least 1"),
        ({"dtype": "float16"}, "dtype must be auto, float32 or bfloat16, not 'float16'"),
        ({"model": "maxi"}, "no model is called 'maxi'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**settings)


def test_settings_that_would_do_nothing(tiny_run, tmp_path):
    assert "warmup_steps" not in PretrainSettings.__dataclass_fields__
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, and needs a schedule; 5 was given"):
        pretrain(PretrainSettings(), tmp_path / "run", warmup_steps=5)
    with pytest.raises(ValueError, match="context_length must be"):
        tiny_run(context_length=0)
    with pytest.raises(ValueError, match="tokens for validation are too few for one window of 16: raise val_fraction"):
        tiny_run(val_fraction=0.0001)
    assert newest_checkpoint(tmp_path / "run") is None


def test_training_gets_well_under_the_unigram_entropy(script_here, moby_dick, tmp_path):
    """The main job in small: less text, fewer tokens, fewer steps."""
    (tmp_path / "book.txt").write_text(moby_dick[:300_000], encoding="utf-8")
    BPETokenizer.train(moby_dick[:300_000], 1000).save(tmp_path / "book.bpe")
    paths = ["--data", tmp_path / "book.txt", "--tokenizer", tmp_path / "book.bpe", "--out", tmp_path / "out"]
    done = script_here(TRAIN, *paths, *"--context-length 64 --batch-size 8 --steps 120 --dtype float32".split())
    assert done.returncode == 0, done.stderr
    loss = float(re.search(r"validation loss ([\d.]+) nats", done.stdout)[1])
    entropy = float(re.search(r"at best ([\d.]+) nats", done.stdout)[1])
    assert 2 < loss < entropy - 0.4


def test_gpt_script(script):
    done = script(GPT, "--model", "mini", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert "16,090,880 weights" in done.stdout


@pytest.mark.parametrize("path", [TRAIN, GENERATE, GPT])
def test_help_shows_defaults(script_here, path):
    done = script_here(path, "--help")
    assert done.returncode == 0 and "(default: " in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file is called"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        (b"GIF\x00\x01", "holds zero bytes"),
        (b"too short", "too few for one window of 16"),
    ],
)
def test_bad_data(script_here, tmp_path, content, message):
    data, out = tmp_path / "data.txt", tmp_path / "out"
    if content is not None:
        data.write_bytes(content)
    one_line(script_here(TRAIN, *TINY, "--data", data, "--out", out), message)
    assert newest_checkpoint(out) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps must be at least 1"),
        ("--batch-size -3", "batch_size must be at least 1"),
        ("--lr 0", "lr must be a number above 0"),
        ("--lr nan", "lr must be a number above 0"),
        ("--val-fraction 0.0001", "for validation are too few for one window of 16"),
        ("--val-fraction 1", "val_fraction must lie between 0 and 1"),
        ("--dropout 1.5", "dropout must be"),
        ("--context-length -1", "context_length must be"),
        ("--warmup-steps -1", "warmup_steps must be at least 0"),
        ("--device abacus", "device 'abacus' is not on this machine"),
        ("--resume", "holds no checkpoint to resume"),
        ("--tokenizer nowhere.bpe", "nowhere.bpe"),
        ("--lr 1e30 --clip 1e30 --warmup-steps 0 --steps 50", "try a lower learning rate"),
    ],
)
def test_nonsense(script_here, vietnamese, tmp_path, options, message):
    one_line(script_here(TRAIN, *TINY, *vietnamese, *options.split(), "--out", tmp_path / "out"), message)


def test_unwritable_output(script_here, vietnamese, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(script_here(TRAIN, *TINY, *vietnamese, "--out", tmp_path / "file" / "out"), "file")


def test_generate_from_what_is_no_checkpoint(script_here, tmp_path):
    one_line(script_here(GENERATE, "--checkpoint", tmp_path), "holds no checkpoint")
    torch.manual_seed(0)
    save_model(
        tmp_path / "model", GPTModel(GPTConfig(vocab_size=50257, n_embd=8, n_head=1, n_layer=1)), gpt2_tokenizer()
    )
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    one_line(script_here(GENERATE, "--checkpoint", tmp_path / "model"), "damaged")
    weights.write_bytes(b"hello")
    one_line(script_here(GENERATE, "--checkpoint", tmp_path / "model"), "damaged")


def test_classifier_script(script, tmp_path, small_checkpoint):
    rows = [f'"{"Win cash" if i % 2 else "See you"}, {i}",{i % 2}' for i in range(60)]
    (tmp_path / "messages.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    out = tmp_path / "out" / "spam.safetensors"
    options = [
        "--model",
        small_checkpoint,
        "--data",
        tmp_path / "messages.csv",
        "--out",
        out,
        "--seeds",
        2,
        "--lr",
        0.003,
    ]
    process = script(CLASSIFY, *map(str, options), "--message", "Win cash, 99")
    assert process.returncode == 0, process.stderr
    assert (
        "mean test accuracy of 2 seeds: 100.0% (TF-IDF" in process.stdout
        and "'Win cash, 99': spam with" in process.stdout
    )
    assert load_classifier(out).head.out_features == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.csv"], "No such file"),
        (["--layers", "gpt.blocks.9"], "no layer is called 'gpt.blocks.9'; there are all, gpt.tok_emb"),
        (["--message", "spam " * 20_000], "tokens; from 1 to 32 can be read: shorten it"),
        (["--model", "nowhere"], "nowhere holds no checkpoint"),
        (["--device", "cuda:7"], "device 'cuda:7' is not on this machine"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_classifier_script_and_bad_input(script_here, tmp_path, small_checkpoint, options, message):
    out = tmp_path / "spam.safetensors"
    one_line(script_here(CLASSIFY, "--model", small_checkpoint, "--out", str(out), "--seeds", "1", *options), message)
    assert not out.exists()
