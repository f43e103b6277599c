"""appendix-E · LoRA: a linear layer learns through two narrow matrices beside it, which are merged in or saved alone."""

import math

import torch
from safetensors.torch import save_file
from torch import nn

from llm_shared.checkpoint import read_safetensors
from llm_shared.resources import replacing


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank change: x (..., d_in) → x @ W.T + bias + alpha / rank * x @ A.T @ B.T (..., d_out).

    A (rank, d_in) starts random, B (d_out, rank) as zeros: at first nothing changes. Source: Hu et al. 2021, section 4.1.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(f"rank must be from 1 to {min(linear.weight.shape)} for this layer, not {rank}")
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        weight = linear.weight
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.merged = False

    def forward(self, x):
        y = self.linear(x)
        return y if self.merged else y + x @ self.A.T @ self.B.T * self.scale

    @torch.no_grad()
    def merge(self, merged=True):
        """Add the change to the weight, or take it out again; a layer that is as asked stays as it is."""
        if merged != self.merged:
            change = self.scale * self.B @ self.A  # (d_out, d_in)
            self.linear.weight += change if merged else -change
            self.merged = merged


def add_lora(model, layers, rank, alpha):
    """Put a LoRALinear in place of each linear layer whose name ends with one of layers, such as "attn.qkv"; freeze the rest.

    A name that fits no linear layer, or a rank below 1, is a ValueError.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for layer in layers:
        if not any(f".{name}".endswith(f".{layer}") for name in linears):
            kinds = sorted({".".join(name.split(".")[-2:]) for name in linears})
            raise ValueError(f"no linear layer is called {layer!r}; there are {', '.join(kinds)}")
    chosen = {
        name: LoRALinear(module, rank, alpha)
        for name, module in linears.items()
        if any(f".{name}".endswith(f".{layer}") for layer in layers)
    }
    model.requires_grad_(False)
    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
        module.A.requires_grad_(True)
        module.B.requires_grad_(True)
    return model


def merge_lora(model, merged=True):
    """Merge every LoRALinear of a model into its weight, or take all out again."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge(merged)


def adapter(model):
    """Return {name: tensor} of what LoRA trains: the parameters that have gradients, the narrow matrices and a new head."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_adapter(path, model):
    """Write only the adapter, to one safetensors file."""
    with replacing(path) as temporary:
        save_file({name: weight.detach().contiguous() for name, weight in adapter(model).items()}, temporary)


def load_adapter(path, model):
    """Put a saved adapter into a model to which `add_lora` gave the same layers; one that does not fit is a ValueError."""
    saved, ours = read_safetensors(path), adapter(model)
    wrong = sorted(
        name for name in saved | ours if name not in saved or name not in ours or saved[name].shape != ours[name].shape
    )
    if wrong:
        raise ValueError(f"{path} does not fit the model: {', '.join(wrong[:3])} and {len(wrong)} in all")
    with torch.no_grad():
        for name, weight in ours.items():
            weight.copy_(saved[name])
