import argparse
import gzip
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from llm_shared.checkpoint import load_model, newest_checkpoint, save_model
from llm_shared.classify import load_classifier
from llm_shared.cli import natural, positive_int, run
from llm_shared.gpt import CONFIGS, GPTConfig, GPTModel
from llm_shared.pretrain import PretrainSettings, pretrain
from llm_shared.resources import locked
from llm_shared.schedule import warmup_cosine
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
import pytest
import torch
from samples import ROOT, one_line

TRAIN = "ch05/01_main-chapter-code/gpt_train.py"
GENERATE = "ch05/01_main-chapter-code/gpt_generate.py"
CLASSIFY = "ch06/01_main-chapter-code/gpt_class_finetune.py"
GPT = "ch04/01_main-chapter-code/gpt.py"
SENTIMENT = "ch06/03_bonus_imdb-classification/sentiment.py"
EXPERIMENTS = "ch06/02_bonus_additional-experiments/additional_experiments.py"
BOOKS = "ch05/03_bonus_pretraining_on_gutenberg/prepare_books.py"
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
    assert script_here(TRAIN, *TINY, *vietnamese, "--out", out, "--resume").returncode == 0
    other = script_here(TRAIN, *TINY, *vietnamese, "--out", out, "--resume", "--lr", "0.5")
    one_line(other, "was made with lr=0.002")
    assert newest_checkpoint(out).name == "step-00000003"

    write = [GENERATE, "--checkpoint", out, "--prompt", "Điều 2", "--max-new-tokens", 40, "--temperature", 1]
    first, again = script_here(*write), script_here(*write)
    assert first.returncode == 0 and first.stdout.startswith("Điều 2")
    assert first.stdout == again.stdout != script_here(*write, "--seed", 7).stdout
    assert script_here(*write, "--prompt", "").returncode == 0


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


def test_two_runs_in_one_folder(tiny_run, script_here, tmp_path, monkeypatch):
    tiny_run()
    with locked(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(OSError, match="another process is writing to .*run: wait for it, or choose another"):
                tiny_run(resume=resume)
        assert script_here(GENERATE, "--checkpoint", tmp_path / "run", "--max-new-tokens", 1).returncode == 0
    leftover = tmp_path / "run" / "step-00000002.0123456789abcdef.tmp"
    leftover.mkdir()
    monkeypatch.setattr("llm_shared.resources.YOUNG", -1)
    tiny_run(resume=True)
    assert not leftover.exists()


@pytest.mark.parametrize("first", [True, False])
def test_compiled_and_plain_runs_resume_each_other(tiny_run, tmp_path, monkeypatch, first):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)

    def ctrl_c(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("llm_shared.pretrain.write_sample", ctrl_c)
        tiny_run(steps=4, compile=first)
    assert newest_checkpoint(tmp_path / "run").name == "step-00000002"
    assert tiny_run(resume=True, steps=4, compile=not first).name == "step-00000004"
    names = set(load_model(tmp_path / "run")[0].state_dict())
    assert len(compiled) == 1 and names == set(GPTModel(CONFIGS["mini"]).state_dict())


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
        ({"model": "maxi"}, "no model is called 'maxi'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**settings)


def test_settings_that_would_do_nothing(tiny_run, tmp_path):
    assert "warmup_steps" not in PretrainSettings.__dataclass_fields__
    with pytest.raises(ValueError, match="warmup_steps would do nothing without a schedule"):
        pretrain(PretrainSettings(), tmp_path / "run", warmup_steps=5)
    with pytest.raises(ValueError, match="context_length must be"):
        tiny_run(context_length=0)
    with pytest.raises(ValueError, match="tokens are too few to validate on: raise val_fraction"):
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


def test_gpt_script(script_here):
    done = script_here(GPT, "--model", "mini", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert "16,090,880 weights" in done.stdout


@pytest.mark.parametrize("path", [TRAIN, GENERATE, GPT])
def test_help_shows_defaults(script_here, path):
    done = script_here(path, "--help")
    assert done.returncode == 0 and "(default: " in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.txt' does not exist, and is none of"),
        ("folder", "data.txt"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        (b"GIF\x00\x01", "holds zero bytes"),
        (b"too short", "too few to validate on"),
    ],
)
def test_bad_data(script_here, tmp_path, content, message):
    data, out = tmp_path / "data.txt", tmp_path / "out"
    if content == "folder":
        data.mkdir()
    elif content is not None:
        data.write_bytes(content)
    one_line(script_here(TRAIN, *TINY, "--data", data, "--out", out), message)
    assert newest_checkpoint(out) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--val-fraction 0.0001", "are too few to validate on"),
        ("--device abacus", "device 'abacus' is not on this machine"),
        ("--resume", "holds no checkpoint to resume"),
        ("--tokenizer nowhere.bpe", "nowhere.bpe"),
        ("--lr 1e30 --clip 1e30 --warmup-steps 0 --steps 50", "try a lower learning rate"),
    ],
)
def test_nonsense(script_here, vietnamese, tmp_path, options, message):
    one_line(script_here(TRAIN, *TINY, *vietnamese, *options.split(), "--out", tmp_path / "out"), message)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (TRAIN, "--context-length --dropout --steps --batch-size --accumulate --lr --warmup-steps --weight-decay --clip --val-fraction --eval-every --seed"),
        (GENERATE, "--max-new-tokens --temperature --top-k --top-p --seed"),
        (GPT, "--max-new-tokens --seed"),
        (CLASSIFY, "--max-length --epochs --batch-size --lr --seeds"),
        (SENTIMENT, "--train-texts --max-length --epochs --batch-size --lr --seeds"),
        (EXPERIMENTS, "--row --lora-rank --batch-size --accumulate --filler --epochs --lr --max-length --seeds"),
    ],
    ids=["train", "generate", "gpt", "classify", "sentiment", "experiments"],
)  # fmt: skip
def test_numbers_that_make_no_sense(numbers_of, monkeypatch, tmp_path, path, options):
    """Every option of every script that takes a number refuses them before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    assert set(numbers_of(path)) == set(options.split())
    wrong = ["-1", "nan", "inf", "-inf", "1e400", "", "x", "½", "0x10", "1,5", "9" * 5000]
    for option in options.split():
        for value in [*wrong, *ALSO_WRONG.get(option, [])]:
            status, said = numbers_of(path, option, value)
            assert status == 2 and said.splitlines()[-1].startswith(
                f"{path.split('/')[-1]}: error: argument {option}: "
            )
            assert len(value) > 99 or f"{value!r} is not a" in said, said
    assert not list(tmp_path.iterdir())


FROM_ONE = ["0", "1e3", "1.0", "2.5", str(2**63), str(10**30)]
ALSO_WRONG = {
    **dict.fromkeys("--context-length --steps --batch-size --accumulate --eval-every --top-k --max-length".split(), FROM_ONE),
    **dict.fromkeys("--epochs --seeds --train-texts --row --lora-rank".split(), FROM_ONE),
    **dict.fromkeys("--warmup-steps --seed --max-new-tokens --filler".split(), FROM_ONE[1:]),
    **dict.fromkeys("--lr --clip".split(), ["0", "-0.0", "1e-400"]),
    "--val-fraction": ["0", "1", "2"], "--dropout": ["1", "1.5"], "--top-p": ["0", "1.01"],
}  # fmt: skip


@pytest.fixture
def numbers_of(capsys, monkeypatch):
    """Given a script: the options that take a number. With an option and a value: (exit status, stderr) of the two."""

    class Parsed(Exception):
        pass

    def run(path, option=None, value=None):
        parsers = []

        def parse_args(parser, words=None, namespace=None):
            parsers.append(parser)
            raise Parsed

        command = [path.split("/")[-1]] + [f"{option}={value}"] * (option is not None)
        with monkeypatch.context() as here:
            here.syspath_prepend((ROOT / path).parent)
            here.setattr(sys, "argv", command)
            if option is None:
                here.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            module = load(path)
            capsys.readouterr()
            try:
                module["main"]()
            except Parsed:
                is_number = [action for action in parsers[0]._actions if action.type not in (None, Path)]
                return [action.option_strings[0] for action in is_number if not action.choices]
            except SystemExit as end:
                return end.code, capsys.readouterr().err

    modules = {}

    def load(path):
        if path not in modules:
            modules[path] = runpy.run_path(str(ROOT / path), run_name="a module")
        return modules[path]

    yield run
    for name in ("models", "reviews"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "value"), [(" 5", 5), ("٣", 3), ("1_000", 1000), ("+7", 7), (str(2**31 - 1), 2**31 - 1)]
)
def test_what_python_reads_as_a_number_is_one(text, value):
    assert positive_int(text) == natural(text) == value


def test_unwritable_output(script_here, vietnamese, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(script_here(TRAIN, *TINY, *vietnamese, "--out", tmp_path / "file" / "out"), "file")
    one_line(script_here(TRAIN, *TINY, *vietnamese, "--out", tmp_path / "file"), "file")
    one_line(script_here(BOOKS, "--out", tmp_path / "file"), "file")
    assert (tmp_path / "file").read_text() == ""


def test_unreadable_data(script_here, tmp_path, monkeypatch):
    (tmp_path / "data.txt").write_text(VIETNAMESE, encoding="utf-8")
    real = open

    def locked(path, *args, **options):
        if str(path).endswith("data.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", locked)
    one_line(script_here(TRAIN, *TINY, "--data", tmp_path / "data.txt", "--out", tmp_path / "out"), "data.txt")


@pytest.mark.parametrize("damage", [slice(0, -9), slice(9, None), slice(0, 0)])
def test_a_damaged_book(script_here, tmp_path, tmp_path_factory, damage):
    out = tmp_path_factory.mktemp("out")
    content = gzip.compress(VIETNAMESE.encode())
    bent = bytearray(content)
    bent[len(bent) // 2] ^= 0xFF
    for i, book in enumerate([content[damage], bytes(bent), content[:10] + b"\xff" * 50]):
        (tmp_path / "book.txt.gz").write_bytes(book)
        one_line(script_here(BOOKS, "--books", tmp_path, "--out", out), "book.txt.gz"), i


def ending(program, *args, **options):
    """Run a program under llm_shared.cli.run, in a process of its own; main is what it defines."""
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # which a shell's background job ignores
    program = f"import signal, sys\n{listen}\nfrom llm_shared.cli import run\n{program}\nrun(main)"
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE} | options
    )


WRITES_A_LOT = "def main():\n    for i in range(100_000):\n        print('a line of text', i, flush=i < 3)"
WRITES_A_LITTLE = "def main():\n    print('a line of text')"


@pytest.mark.parametrize("program", [WRITES_A_LOT, WRITES_A_LITTLE])
def test_a_pipe_that_nobody_reads_any_more(program):
    reads, writes = os.pipe()
    os.close(reads)
    process = ending(program, stdout=writes)
    os.close(writes)
    assert process.communicate()[1] == "" and process.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
@pytest.mark.parametrize("program", [WRITES_A_LOT, WRITES_A_LITTLE])
def test_output_onto_a_full_disk(program):
    with open("/dev/full", "w") as full:
        process = ending(program, stdout=full)
    assert process.communicate()[1] == "error: [Errno 28] No space left on device\n" and process.returncode == 1


def test_closed_output():
    program = "from tqdm import tqdm\ndef main():\n    print('text')\n    tqdm.write('text')\n    list(tqdm(range(3)))"
    for closed in ("sys.stdout = sys.stderr = None", "sys.stdout = None"):
        process = ending(f"{closed}\n{program}")
        process.communicate()
        assert process.returncode == 0
    process = ending(program, preexec_fn=lambda: os.close(1), stdout=None)
    assert process.communicate()[1].count("Error") == 0 and process.returncode == 0


@pytest.mark.parametrize("stream", [io.StringIO(), SimpleNamespace(closed=False, write=str, flush=str)])
def test_output_that_is_no_console(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    run(lambda: None)
    assert sys.stdout is stream


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_being_stopped_cleans_up(tmp_path, name):
    program = """
import time
from llm_shared.resources import replacing
def main():
    with replacing(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""
    process = ending(program, tmp_path / "file")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    assert process.communicate()[1] == "\nstopped\n" and process.returncode == 1
    assert not list(tmp_path.iterdir())


class InductorError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "try a smaller --batch-size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …"), "try a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "try a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has …"), "try a smaller --batch-size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "try a smaller --batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "try a smaller --batch-size"),
        (InductorError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx\n\nSet …"), "leave it out"),
        (InductorError("CppCompileError: C++ compile error\n\nCommand:\ng++ …"), "leave it out"),
        (RuntimeError("Cannot find a working triton installation."), "leave it out"),
        (OSError(28, "No space left on device", "runs/model"), "No space left on device: 'runs/model'"),
        (OSError("no encoder:\n  one line\n\n\tand another\r\n"), "error: no encoder: one line and another"),
        (ValueError("two\nlines"), "two lines"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't decode"),
        (FloatingPointError("the loss is nan"), "nan"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_errors_in_one_line(capsys, error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert "\n" not in end.value.code and end.value.code.startswith("error: ") and message in end.value.code


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), KeyError("x"), IndexError("x"), TypeError("x")]
)
def test_faults_of_the_program_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_memory_that_is_not_there(script_here, small_checkpoint):
    write = [GENERATE, "--checkpoint", small_checkpoint, "--max-new-tokens"]
    one_line(script_here(*write, 10**15), "try a smaller")
    one_line(script_here(*write, 2**62), "try a smaller")


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


def test_classifier_script(script_here, tmp_path, small_checkpoint):
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
    process = script_here(CLASSIFY, *map(str, options), "--message", "Win cash, 99")
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
        (["--layers", "gpt.blocks.9"], "no layer is called 'gpt.blocks.9'; there are all, gpt, gpt.tok_emb"),
        (["--message", "spam " * 20_000], "tokens do not fit the context of 32"),
        (["--model", "nowhere"], "nowhere holds no checkpoint"),
        (["--device", "cuda:7"], "device 'cuda:7' is not on this machine"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_classifier_script_and_bad_input(script_here, tmp_path, small_checkpoint, options, message):
    out = tmp_path / "spam.safetensors"
    one_line(script_here(CLASSIFY, "--model", small_checkpoint, "--out", str(out), "--seeds", "1", *options), message)
    assert not out.exists()
