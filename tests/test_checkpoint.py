import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

from llm_shared.checkpoint import load_checkpoint, load_model, newest_checkpoint, save_checkpoint, save_model
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.training import make_optimizer
import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from samples import MIXED_TEXT, ROOT

TOKENIZER = BPETokenizer.train(MIXED_TEXT, 300)
CONFIG = GPTConfig(vocab_size=300, context_length=8, n_embd=16, n_head=2, n_layer=2)
TRAIN = ROOT / "ch05/01_main-chapter-code/gpt_train.py"


@pytest.fixture
def run_state(tmp_path):
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    optimizer = make_optimizer(model, 1e-3)
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()
    return model, optimizer, tmp_path / "run"


def save(model, optimizer, out, step):
    save_checkpoint(out, model, TOKENIZER, optimizer, [{"step": step}], {"lr": 1})


def test_model_round_trip(tmp_path):
    for own in (TOKENIZER, gpt2_tokenizer()):
        model, folder = GPTModel(replace(CONFIG, vocab_size=own.n_vocab)).eval(), tmp_path / own.__class__.__name__
        save_model(folder, model, own)
        again, its_tokenizer = load_model(folder)
        assert again.config == model.config and type(its_tokenizer) is type(own)
        ids = torch.arange(8)[None]
        assert torch.equal(again(ids), model(ids))
        assert all(weight.requires_grad for weight in again.parameters())
        half, _ = load_model(folder, dtype=torch.bfloat16)
        assert half.head(torch.zeros(1, 16).bfloat16()).dtype == torch.bfloat16


def test_a_tokenizer_that_cannot_be_written_is_refused(tmp_path):
    """Without it, the folder would open with GPT-2's tokenizer."""
    other = tiktoken.Encoding("x", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    with pytest.raises(ValueError, match="BPETokenizer"):
        save_model(tmp_path / "model", GPTModel(CONFIG), other)
    assert not (tmp_path / "model").exists()


class Bomb:
    """A pickle of it writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_a_program_in_it_is_refused(run_state):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    target = out / "hacked"
    torch.save(Bomb(target), newest_checkpoint(out) / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is damaged") as caught:
        load_checkpoint(out, model, optimizer, {"lr": 1})
    assert "\n" not in str(caught.value) and not target.exists()
    torch.load(newest_checkpoint(out) / "run.pt", weights_only=False).close()
    assert target.exists()  # it would have worked


def test_only_the_newest_checkpoint_stays(run_state, monkeypatch):
    monkeypatch.setattr("llm_shared.resources.YOUNG", -1)
    model, optimizer, out = run_state
    assert newest_checkpoint(out) is None
    for step in (5, 10, 100):
        save(model, optimizer, out, step)
    (out / "step-00000200.0123456789abcdef.tmp").mkdir()  # what a killed run leaves
    assert newest_checkpoint(out).name == "step-00000100"
    save(model, optimizer, out, 200)
    assert [path.name for path in out.iterdir()] == ["step-00000200"]


def test_only_ones_own_checkpoints_are_removed(run_state, monkeypatch):
    monkeypatch.setattr("llm_shared.resources.YOUNG", -1)
    model, optimizer, out = run_state
    theirs = [
        "step-by-step-notes",
        "step-00000100-backup",
        "step-100",
        "step-00000001.2024.notes.tmp",
        "my step-00000001",
    ]
    for name in [*theirs, "step-00000004"]:
        (out / name).mkdir(parents=True)
        (out / name / "notes.txt").write_text("mine")
    (out / "step-00000200").write_text("a file")
    for name in (
        "step-00000007.fedcba9876543210.tmp",
        "step-00000008.0123456789abcdef.tmp",
    ):  # writers killed at other steps
        (out / name / "new").mkdir(parents=True)
    for step in (5, 10, 99_999_999):
        save(model, optimizer, out, step)
        assert newest_checkpoint(out).name == f"step-{step:08d}"
    assert {path.name for path in out.iterdir()} == {*theirs, "step-00000004", "step-00000200", "step-99999999"}


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "run.pt"])
def test_a_checkpoint_copied_in_part_does_not_count(run_state, missing):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    shutil.copytree(out / "step-00000005", out / "step-00000009")
    (out / "step-00000009" / missing).unlink()
    assert load_checkpoint(out, model, optimizer, {"lr": 1}) == [{"step": 5}]
    save(model, optimizer, out, 7)
    assert [path.name for path in out.iterdir()] == ["step-00000007"]


def test_a_run_saved_on_gpus_goes_on_without(run_state, monkeypatch):
    """Every tensor of the file says that it lay on the second of two GPUs, and there are random states of them and of MPS."""
    model, optimizer, out = run_state
    states = [torch.full((16,), i, dtype=torch.uint8) for i in range(3)]
    with monkeypatch.context() as gpus:
        gpus.setattr(torch.cuda, "is_available", lambda: True)
        gpus.setattr(torch.cuda, "get_rng_state_all", lambda: states[:2])
        gpus.setattr(torch.backends.mps, "is_available", lambda: True)
        gpus.setattr(torch.mps, "get_rng_state", lambda: states[2])
        gpus.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        save(model, optimizer, out, 5)
    expected = {name: moments["exp_avg"].clone() for name, moments in optimizer.state_dict()["state"].items()}
    drawn, other = torch.rand(3), make_optimizer(model, 1e-3)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(newest_checkpoint(out) / "run.pt", weights_only=True)
    load_checkpoint(out, model, other, {"lr": 1})
    for name, moments in other.state_dict()["state"].items():
        assert moments["exp_avg"].device.type == "cpu" and torch.equal(moments["exp_avg"], expected[name])
    assert torch.equal(torch.rand(3), drawn)

    found = []  # again on a machine with one GPU, and on one with MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.extend)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "set_rng_state", found.append)
    load_checkpoint(out, model, other, {"lr": 1})
    assert [int(state[0]) for state in found] == [0, 2] and {state.device.type for state in found} == {"cpu"}


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({"tokens": 1}, {"tokens": 2}, "the text or the tokenizer has changed"),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, "dtype=bfloat16 .add --dtype bfloat16."),
        ({"steps": 500}, {"steps": 600}, "steps=500 .the learning rate depends on them: for more steps begin another"),
        ({"warmup_steps": 5}, {"warmup_steps": 9}, "made with warmup_steps=5: resume it with the same, or choose"),
        ({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 1}, "made with lr=0.1, seed=0"),
        ({"dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}, None),  # as an earlier version wrote it
        ({}, {"new": 0.0}, None),  # a run from before that setting
        ({"gone": False}, {}, None),  # a setting that is no more
        (
            {"data": "a.txt", "tokenizer": "a", "compile": False},
            {"data": "b.txt", "tokenizer": "b", "compile": True},
            None,
        ),
    ],
)
def test_settings_at_resume(run_state, was, now, message):
    model, optimizer, out = run_state
    save_checkpoint(out, model, TOKENIZER, optimizer, [{"step": 5}], was)
    if message is None:
        assert load_checkpoint(out, model, optimizer, now) == [{"step": 5}]
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(out, model, optimizer, now)
    assert "\n" not in str(caught.value) and "tokens=" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"model": 1}, [1, 2], {"settings": {}, "history": [], "random": 0}])
def test_another_programs_run_is_refused(run_state, content):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    torch.save(content, newest_checkpoint(out) / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is damaged or no run's") as caught:
        load_checkpoint(out, model, optimizer, {"lr": 1})
    assert "\n" not in str(caught.value)


def test_a_reader_of_the_checkpoint_before_does_not_stop_the_run(run_state, monkeypatch):
    """Windows does not remove a file that gpt_generate has open; the next save does."""
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)

    def in_use(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "in use", path)

    with monkeypatch.context() as windows:
        windows.setattr("llm_shared.checkpoint.shutil", SimpleNamespace(rmtree=in_use))
        save(model, optimizer, out, 10)
    assert newest_checkpoint(out).name == "step-00000010"
    save(model, optimizer, out, 15)
    assert [path.name for path in out.iterdir()] == ["step-00000015"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_killed_save_leaves_a_whole_model(tmp_path, monkeypatch):
    """The weights are all equal, to a number that grows with each save: two versions must not mix."""
    monkeypatch.setattr("llm_shared.resources.YOUNG", -1)
    model = GPTModel(CONFIG)
    for weight in model.parameters():
        weight.data.fill_(-1)
    for delay in (0.05, 0.1, 0.15, random.uniform(0.05, 0.2)):
        child = os.fork()
        if child == 0:
            for number in range(1_000_000):
                for weight in model.parameters():
                    weight.data.fill_(number)
                save_model(tmp_path / "model", model, TOKENIZER)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "model").exists():
            weights = load_model(tmp_path / "model")[0].state_dict().values()
            assert len({number for weight in weights for number in weight.unique().tolist()}) == 1
        save_model(tmp_path / "model", model, TOKENIZER)
        assert os.listdir(tmp_path) == ["model"]


def test_gaps_between_a_tokenizers_ids_are_no_traceback(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    other = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|end|>": 299})
    with pytest.raises(ValueError, match="BPETokenizer"):
        save_model(tmp_path / "model", GPTModel(CONFIG), other)


def test_other_settings_are_refused(run_state):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    assert load_checkpoint(out, model, optimizer, {"lr": 1}) == [{"step": 5}]
    with pytest.raises(ValueError, match="was made with lr=1"):
        load_checkpoint(out, model, optimizer, {"lr": 2})
    with pytest.raises(ValueError, match="do not fit the model"):
        load_checkpoint(out, GPTModel(replace(CONFIG, n_embd=32)), optimizer, {"lr": 1})
    with pytest.raises(ValueError, match="holds no checkpoint to resume"):
        load_checkpoint(out / "elsewhere", model, optimizer, {})


def test_damaged_checkpoints_are_refused(run_state):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    folder = newest_checkpoint(out)
    weights = load_file(folder / "model.safetensors")
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def refuse(message):
        with pytest.raises(ValueError, match=message) as error:
            load_model(out)
        assert "\n" not in str(error.value)
        for path, content in whole.items():
            path.write_bytes(content)

    for size in (0, 7, 100, len(whole[folder / "model.safetensors"]) - 1):
        (folder / "model.safetensors").write_bytes(whole[folder / "model.safetensors"][:size])
        refuse("damaged")
    (folder / "config.json").write_text(json.dumps({**CONFIG.__dict__, "n_embd": 18}))
    refuse("do not fit the model: blocks.0")
    (folder / "config.json").write_text(json.dumps({**CONFIG.__dict__, "n_layer": 3}))
    refuse("do not fit")
    (folder / "config.json").write_text("{}x")
    refuse("damaged")
    (folder / "config.json").write_text('{"hidden_size": 3}')
    refuse("no checkpoint of this project")
    save_file({**weights, "extra": torch.zeros(1)}, folder / "model.safetensors")
    refuse("extra and 1 in all")
    (folder / "model.safetensors").unlink()
    refuse("holds no checkpoint")
    (folder / "run.pt").write_bytes(whole[folder / "run.pt"][:1000])
    with pytest.raises(ValueError, match=r"run.pt is damaged"):
        load_checkpoint(out, model, optimizer, {"lr": 1})
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_model(out / "elsewhere")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit a process's files")
def test_a_full_disk_keeps_the_earlier_checkpoint(run_state):
    import resource

    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    before = {path.name: path.read_bytes() for path in newest_checkpoint(out).iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (0, 1000, 30_000):  # bytes that fit: nothing, half of the weights, half of the optimizer
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="the one before it is untouched"):
                save(model, optimizer, out, 10)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert [path.name for path in out.iterdir()] == ["step-00000005"]
            assert {path.name: path.read_bytes() for path in newest_checkpoint(out).iterdir()} == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The command of a small run with dropout, on a small text with a small tokenizer of its own."""
    folder = tmp_path_factory.mktemp("small_run")
    book = (ROOT / "llm_shared/assets/moby-dick.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "book.txt").write_text(book, encoding="utf-8")
    BPETokenizer.train(book, 300).save(folder / "book.bpe")
    options = (
        "--context-length 32 --batch-size 2 --accumulate 2 --dropout 0.1 --steps 16 --eval-every 2 --dtype float32"
    )
    paths = ["--data", folder / "book.txt", "--tokenizer", folder / "book.bpe"]

    def command(out, *more):
        return [sys.executable, TRAIN, *options.split(), *map(str, paths), "--out", str(folder / out), *more]

    return command, folder


def final(folder):
    checkpoint = newest_checkpoint(folder)
    run = torch.load(checkpoint / "run.pt", weights_only=True)
    return load_file(checkpoint / "model.safetensors"), run["history"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_and_resumed_equals_uninterrupted(small_run):
    command, folder = small_run
    subprocess.run(command("whole"), check=True, capture_output=True)
    weights, history = final(folder / "whole")

    rng = random.Random()  # another moment each time the test runs
    kills, resume = 0, []
    while True:
        process = subprocess.Popen(command("killed", *resume), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        at_start = newest_checkpoint(folder / "killed")
        while kills < 3 and process.poll() is None and newest_checkpoint(folder / "killed") == at_start:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if kills == 3 or process.poll() is not None:
            assert process.wait() == 0, process.stdout.read().decode()
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills, resume = kills + 1, ["--resume"]
    assert kills > 0

    resumed_weights, resumed_history = final(folder / "killed")
    assert resumed_history == history
    for name in weights:
        assert torch.equal(weights[name], resumed_weights[name]), name


def test_the_model_of_another_program_stays(tmp_path):
    (tmp_path / "hf").mkdir()
    for name, content in {"config.json": '{"model_type": "llama"}', "model.safetensors": "foreign"}.items():
        (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(ValueError, match="holds the model of another program: choose another folder"):
        save_model(tmp_path / "hf", GPTModel(CONFIG), TOKENIZER)
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "foreign"


def swap_moments(run):
    states = run["optimizer"]["state"]
    states[0], states[3] = states[3], states[0]


DAMAGES = [
    swap_moments,  # else fused AdamW reads beyond a tensor's end
    lambda run: run.update(optimizer={}),
    lambda run: run.update(random={}),
    lambda run: run.update(random={"cpu": torch.zeros(3)}),
    lambda run: run.update(history=[]),
    lambda run: run.update(history=None),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_part_of_a_run_is_checked(run_state, damage):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    path = newest_checkpoint(out) / "run.pt"
    run = torch.load(path, weights_only=True)
    damage(run)
    torch.save(run, path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"run\.pt is damaged") as caught:
        load_checkpoint(out, model, optimizer, {"lr": 1})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("size", [{"vocab_size": 2**62}, {"context_length": 2**70}, {"n_embd": 2**40}])
def test_sizes_that_no_model_has(run_state, size):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    (newest_checkpoint(out) / "config.json").write_text(json.dumps(CONFIG.__dict__ | size))
    with pytest.raises(ValueError, match="there is no model as large as|do not fit the model"):
        load_model(out)
