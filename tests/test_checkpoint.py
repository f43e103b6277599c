import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from samples import MIXED_TEXT, ROOT

from llm_shared.checkpoint import load_checkpoint, load_model, newest_checkpoint, save_checkpoint, save_model
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.training import make_optimizer

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


def test_only_the_newest_checkpoint_stays(run_state):
    model, optimizer, out = run_state
    assert newest_checkpoint(out) is None
    for step in (5, 10, 100):
        save(model, optimizer, out, step)
    (out / "step-00000200.123.tmp").mkdir()  # what a killed run leaves
    assert newest_checkpoint(out).name == "step-00000100"
    save(model, optimizer, out, 200)
    assert [path.name for path in out.iterdir()] == ["step-00000200"]


def test_other_settings_are_refused(run_state):
    model, optimizer, out = run_state
    save(model, optimizer, out, 5)
    assert load_checkpoint(out, model, optimizer, {"lr": 1}) == [{"step": 5}]
    with pytest.raises(ValueError, match="was made with lr=1"):
        load_checkpoint(out, model, optimizer, {"lr": 2})
    with pytest.raises(ValueError, match="was made with lr=1, seed=None"):
        load_checkpoint(out, model, optimizer, {"seed": 2})
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
    refuse("not a checkpoint of this project")
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
