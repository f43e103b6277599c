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
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    names = [kind if i == 0 else f"{kind}:{i}" for kind, count in counts.items() for i in range(count)]
    if name == "auto":
        return torch.device(names[0])
    if name.removesuffix(":0") not in names:
        raise ValueError(f"device {name!r} is not on this machine; use {' or '.join(names)}")
    return torch.device(name)


def pick_dtype(name, device):
    """Return torch.float32 or torch.bfloat16; auto is bfloat16 where the device computes it natively. Another is a ValueError."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    native = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": lambda: processor_kind() != "other",
    }
    if name == "auto":
        return torch.bfloat16 if native.get(device.type, lambda: False)() else torch.float32
    if name not in dtypes:
        raise ValueError(f"number type {name!r} is none of auto, {', '.join(dtypes)}")
    return dtypes[name]


def keep_freed_memory():
    """Tell glibc (Linux) to keep freed memory: it gives every block over 32 MB back, and each step pays for it again.

    The price: the process stays as large as it once was. Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
