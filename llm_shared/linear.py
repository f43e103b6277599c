"""ch03 · The linear layer: nn.Linear, turned round where decoding spends its time."""

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = {torch.float32: range(8, 17), torch.bfloat16: range(2, 65)}  # measured: python tests/bench/linear.py


def linear(x, weight, bias=None):
    """Return x @ weight.T + bias; x (..., d_in), weight (d_out, d_in), bias (d_out) → (..., d_out).

    Decoding multiplies large matrices by few rows, x (B, 1, d_in). On a CPU, one row is a matrix × vector product;
    FEW_ROWS go faster as weight @ x.T, because the packing that the hardware asks for then falls on x, the small
    side. A weight that lies the other way round in memory, as in OpenAI's files, is already turned.
    """
    if torch.is_grad_enabled() or not x.is_cpu or x.ndim != 3 or x.dtype is not weight.dtype:
        return F.linear(x, weight, bias)
    B, T, d_in = x.shape
    if B * T == 1:
        row = x.flatten()
        y = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
    elif B * T in FEW_ROWS.get(x.dtype, ()) and weight.is_contiguous():
        y = (weight @ x.reshape(-1, d_in).T).T.contiguous()
        if bias is not None:
            y += bias
    else:
        return F.linear(x, weight, bias)
    return y.view(B, T, -1)


class Linear(nn.Linear):
    """nn.Linear whose forward pass is `linear`: same weights, same numbers, faster decoding."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
