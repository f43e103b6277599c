import subprocess
import sys

import pytest
import torch

from llm_shared.hardware import keep_freed_memory, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == pick_device("cpu") == CPU
    for name in ("cuda", "mps", "cuda:1", "abacus", ""):
        with pytest.raises(ValueError, match="is not on this machine; use cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda" and pick_device("cuda:1").index == 1


def test_pick_dtype(monkeypatch):
    assert pick_dtype("float32", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pick_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert pick_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert pick_dtype("auto", CPU) == torch.bfloat16
    assert pick_dtype("auto", torch.device("mps")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_kept_memory_is_used_again():
    """64 MB taken and given back cost page faults each time, or none once the process has grown."""
    program = """
import resource, sys, torch
from llm_shared.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(
            subprocess.run([sys.executable, "-c", program, how], capture_output=True, check=True, text=True).stdout
        )
        for how in ("keep", "give back")
    }
    assert faults["keep"] < faults["give back"] / 5


def test_other_platforms_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is None
