import io
import sys
from functools import partial

from llm_shared.cli import progress
from llm_shared.data import create_dataloader
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.training import make_optimizer, train
import pytest
import torch
from tqdm import tqdm


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def said(monkeypatch):
    """said(stream, work): what four steps of progress write to a stream as standard error; each takes ten seconds."""
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # pytest's plugin brings it

    def run(stream, work=lambda i: None):
        monkeypatch.setattr(sys, "stderr", stream)
        for i in progress(range(4), desc="steps", disable=False, dynamic_ncols=True):
            work(i)
        return stream.getvalue()

    return run


def test_a_terminal_shows_one_bar(said):
    text = said(Terminal())
    assert text.count("\r") > 4 and text.count("\n") == 1 and "4/4" in text


def test_a_log_holds_lines(said):
    *lines, rest = said(io.StringIO()).split("\n")
    assert len(lines) > 4 and "4/4" in lines[-1] and rest == ""
    assert all(line.startswith("steps: ") and "\r" not in line for line in lines)


def test_a_notebook_shows_one_bar(said, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    assert said(io.StringIO()).count("\n") == 1


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_is_said_in_between_is_not_torn(said, stream):
    out = io.StringIO()
    text = said(stream(), lambda i: tqdm.write(f"step {i}", file=out))
    assert out.getvalue() == "step 0\nstep 1\nstep 2\nstep 3\n" and "4/4" in text


def test_a_quick_training_writes_few_lines_into_a_log(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("llm_shared.training.progress", partial(progress, disable=False))
    model = GPTModel(GPTConfig(vocab_size=30, context_length=4, n_embd=8, n_head=1, n_layer=1))
    loader = create_dataloader(torch.arange(30).numpy(), 2, 4, stride=4)
    train(model, make_optimizer(model, 1e-3), loader, loader, 20, eval_every=10)
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) <= 3 and "20/20" in lines[-1] and "loss " in lines[-1]
