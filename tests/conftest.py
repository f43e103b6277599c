import runpy
import subprocess
import sys

from llm_shared.checkpoint import save_model
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import gpt2_tokenizer
import pytest
import torch
from samples import ROOT

collect_ignore = ["bench"]  # benchmarks measure; they do not test


@pytest.fixture
def script():
    """Run a script of the repository as a reader would; return the finished process."""

    def run(path, *args, cwd=None, **options):
        command = [sys.executable, str(ROOT / path), *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=120, cwd=cwd, **options
        )

    return run


@pytest.fixture
def script_here(capsys, monkeypatch):
    """The same inside this process, which saves the start; an exit with a text is Python's exit status 1."""

    def run(path, *args):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return run


@pytest.fixture
def moby_dick():
    return (ROOT / "llm_shared/assets/moby-dick.txt").read_text(encoding="utf-8")


@pytest.fixture
def small_checkpoint(tmp_path):
    """The folder of a model with random weights, small enough to train in a test."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=50257, context_length=32, n_embd=16, n_head=2, n_layer=2))
    save_model(tmp_path / "small", model, gpt2_tokenizer())
    return str(tmp_path / "small")
