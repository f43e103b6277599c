"""setup · What this machine offers: device, processor, number type, and memory that is kept."""

import ctypes
import sys

import torch

BFLOAT16_UNITS = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}  # asked of torch.cpu


def processor_kind():
    """Return "amx" (Intel's servers since 2023), "avx512_bf16" (AMD's Zen 4 and 5), or "other": what multiplies matrices."""
    return next((kind for kind, name in BFLOAT16_UNITS.items() if getattr(torch.cpu, name, bool)()), "other")


def pick_device(name="auto"):
    """Return the torch.device called name; auto is cuda, else mps, else cpu. One that is missing is a ValueError."""
    cuda = [f"cuda:{i}" if i else "cuda" for i in range(torch.cuda.device_count())]
    names = [*cuda, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if name == "auto":
        return torch.device(names[0])
    if name.removesuffix(":0") not in names:
        raise ValueError(f"device {name!r} is not on this machine; use {' or '.join(names)}")
    return torch.device(name)


def pick_dtype(name, device):
    """Return torch.float32 or torch.bfloat16; auto is bfloat16 where the device computes it natively. Another is a ValueError."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"number type {name!r} is none of auto, float32, bfloat16")
    if name != "auto":
        return getattr(torch, name)
    native = device.type == "cpu" and processor_kind() != "other"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory():
    """Tell glibc (Linux) to keep freed blocks over 32 MB: each step would pay for them again. Source: mallopt(3)."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
