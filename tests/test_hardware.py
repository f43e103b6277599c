import subprocess
import sys

from llm_shared.hardware import keep_freed_memory, pick_device, pick_dtype
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda, mps): this one has so many of each."""

    def has(cuda=0, mps=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))

    return has


def test_pick_device(machine):
    machine()
    assert pick_device() == pick_device("cpu") == CPU and pick_device("cpu:0").type == "cpu"
    machine(mps=1)
    assert pick_device().type == pick_device("mps").type == "mps"
    machine(cuda=2)
    assert pick_device().type == "cuda" and pick_device("cuda:1").index == 1 and pick_device("cuda:0").index == 0


@pytest.mark.parametrize("name", ["cuda:2", "cuda:7", "cuda:x", "cuda:", "cuda:-1", "cuda:01", "cuda:0:0", "CUDA", "xpu", "meta", "", "auto ", "abacus", "cpu:3", "mps", "mps:0", "cpu:x", "gpu", "0"])  # fmt: skip
def test_devices_that_are_not_there(machine, name):
    machine(cuda=2)
    with pytest.raises(ValueError, match=r"^device '.*' is not on this machine; use cuda or cuda:1 or cpu$"):
        pick_device(name)
    machine()
    with pytest.raises(ValueError, match="is not on this machine; use cpu$"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["float16", "bf16", "", "Float32", "float64"])
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "xpu", "meta"])
def test_number_types_that_are_not_there(name, device):
    with pytest.raises(ValueError, match=f"^number type '{name}' is none of auto, float32, bfloat16$"):
        pick_dtype(name, torch.device(device))


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
    for device in ("mps", "xpu", "meta"):
        assert pick_dtype("auto", torch.device(device)) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_kept_memory_is_used_again():
    """64 MB taken and given back cost page faults each time, or none once the process has grown."""
    program = """
import resource, torch
from llm_shared.hardware import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
keep_freed_memory()
faults()  # it grows
print(given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 5


def test_other_platforms_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is None
