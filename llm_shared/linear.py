"""setup · The linear layer: nn.Linear's numbers, faster where decoding spends its time and this processor gains by it."""

from llm_shared.hardware import processor_kind
import torch
import torch.nn.functional as F
from torch import nn

PROCESSOR = processor_kind()
AMX_ROWS = {torch.float32: range(8, 17), torch.bfloat16: range(2, 65)}
LARGE = 2**19  # weights; a smaller matrix stays in the caches


def way(rows, weight):
    """Return how to multiply few rows by a weight here, as tests/bench/linear.py measured: plain, vector or turned."""
    if PROCESSOR == "amx":
        return "vector" if rows == 1 else "turned" if rows in AMX_ROWS.get(weight.dtype, ()) else "plain"
    if PROCESSOR == "avx512_bf16" and weight.dtype is torch.float32 and weight.numel() > LARGE:
        growth = weight.shape[0] / weight.shape[1]
        most = 4 if growth < 2 else 7 if growth < 16 else 8  # the head grows most
        return "turned" if 1 + (growth < 2) <= rows <= most else "plain"
    return "plain"


def linear(x, weight, bias=None):
    """Return x @ weight.T + bias; x (..., d_in), weight (d_out, d_in), bias (d_out) → (..., d_out).

    Decoding multiplies large matrices by few rows, x (B, 1, d_in), on a CPU. "turned" is weight @ x.T: the packing that
    a product asks for falls on the small side; one row is turned as two equal ones, which are read faster.
    """
    if torch.is_grad_enabled() or not x.is_cpu or x.ndim != 3 or x.dtype is not weight.dtype:
        return F.linear(x, weight, bias)
    B, T, d_in = x.shape
    chosen = way(B * T, weight)
    if chosen == "vector":
        y = weight.mv(x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
    elif chosen == "turned" and weight.is_contiguous():
        rows = x.reshape(-1, d_in) if B * T > 1 else x.reshape(1, d_in).repeat(2, 1)
        y = (weight @ rows.T).T[: B * T].contiguous()
        if bias is not None:
            y += bias
    else:
        return F.linear(x, weight, bias)
    return y.view(B, T, -1)


class Linear(nn.Linear):
    """nn.Linear whose forward pass is `linear`: same weights, same numbers, faster decoding."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
