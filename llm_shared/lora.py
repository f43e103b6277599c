"""appendix-E · LoRA: a linear layer learns through two narrow matrices beside it, which are merged in or saved alone."""

import copy
import math
import warnings

from llm_shared.checkpoint import read_safetensors
from llm_shared.resources import write_safetensors
import torch
from safetensors import safe_open
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank change: x (..., d_in) → x @ W.T + bias + alpha / rank * x @ A.T @ B.T (..., d_out).

    A (rank, d_in) starts random, B (d_out, rank) as zeros: at first nothing changes (Hu et al. 2021, section 4.1).
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        weight = linear.weight
        if rank not in range(1, min(weight.shape) + 1):
            raise ValueError(f"rank must be from 1 to {min(weight.shape)} for this layer, not {rank}")
        if not 0 < alpha <= torch.finfo(weight.dtype).max:
            raise ValueError(f"alpha must be a number above 0, not {alpha}")
        self.linear, self.original, self.merged = linear, None, False  # original: what linear was before the merge
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        linear.requires_grad_(False)

    def forward(self, x):
        if not self.merged:
            return self.linear(x) + x @ self.A.T @ self.B.T * self.scale
        if self.training and torch.is_grad_enabled() and self.A.requires_grad:
            raise ValueError("a merged LoRA learns nothing: call merge_lora(model, merged=False), or model.eval()")
        return self.linear(x)

    @torch.no_grad()
    def plain(self):
        """Return a linear layer that does the same: its weight is W + alpha / rank * B @ A, rounded once."""
        linear, exact = copy.deepcopy(self.linear), torch.promote_types(self.A.dtype, torch.float32)
        if not self.merged:
            linear.weight.copy_(linear.weight + self.scale * self.B.to(exact) @ self.A.to(exact))
        return linear

    def merge(self, merged=True):
        """Put the plain layer in the place of the original, which is kept, or take it out again; else nothing happens."""
        if merged != self.merged:
            self.linear, self.original = (self.plain(), self.linear) if merged else (self.original, None)
            self.merged = merged


def lora_layers(model):
    """Return {name: LoRALinear} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model, layers, rank, alpha):
    """Put a LoRALinear in place of each linear layer whose name ends with one of layers; freeze the rest; or change nothing."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ends = tuple(f".{layer}" for layer in layers)
    if isinstance(layers, str) or not ends:
        raise ValueError(f"layers must be a list of names, such as ['attn.qkv'], not {layers!r}")
    if lora_layers(model):
        raise ValueError("the model wears LoRA already: name all layers in one call, or take it off with unwrap_lora")
    for end in ends:
        if not any(f".{name}".endswith(end) for name in linears):
            kinds = sorted({".".join(name.split(".")[-2:]) for name in linears})
            raise ValueError(f"no linear layer is called {end[1:]!r}; there are {', '.join(kinds)}")
    narrow_first = sorted(linears, key=lambda name: min(linears[name].weight.shape))  # a wrong rank fails at once
    loras = {name: LoRALinear(linears[name], rank, alpha) for name in narrow_first if f".{name}".endswith(ends)}
    model.requires_grad_(False)
    for name, lora in loras.items():
        model.set_submodule(name, lora)
    return model


def merge_lora(model, merged=True):
    """Merge every LoRALinear of a model into its weight, or take all out again."""
    for layer in lora_layers(model).values():
        layer.merge(merged)


def unwrap_lora(model):
    """Put a plain linear layer in place of each LoRALinear; return the model, which can be saved: frozen as it was, not compiled."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.plain())
    return getattr(model, "_orig_mod", model)


def adapter(model):
    """Return {name: tensor} of what LoRA trains: the parameters that have gradients, the narrow matrices and a new head."""
    return {name.replace("_orig_mod.", ""): w for name, w in model.named_parameters() if w.requires_grad}


def lora_settings(model):
    """Return {"alpha", "layers", "rank"}, texts, of a model's LoRA; none, and a frozen one, are a ValueError."""
    worn = lora_layers(model)
    if not worn or not all(layer.A.requires_grad and layer.B.requires_grad for layer in worn.values()):
        raise ValueError("the model wears no LoRA, or a frozen one, and nobody can tell what that one trained")
    kinds = sorted({".".join(name.split(".")[-2:]) for name in worn})
    ranks = sorted({str(len(layer.A)) for layer in worn.values()})
    alphas = sorted({f"{layer.scale * len(layer.A):g}" for layer in worn.values()})
    return {"alpha": ", ".join(alphas), "layers": ", ".join(kinds), "rank": ", ".join(ranks)}


def save_adapter(path, model):
    """Write only the adapter to one safetensors file, its layers, rank and alpha in the head."""
    write_safetensors(path, {name: weight.detach() for name, weight in adapter(model).items()}, lora_settings(model))


@torch.no_grad()
def load_adapter(path, model):
    """Put a saved adapter into a model with the same LoRA, else a ValueError; that W is the same, no file can tell."""
    saved, ours, worn = read_safetensors(path), adapter(model), lora_settings(model)
    told = dict(sorted((safe_open(path, "pt").metadata() or {}).items()))
    if not told:
        warnings.warn(f"{path} does not tell its alpha; it is taken to be {worn['alpha']}, the model's", stacklevel=2)
    elif told != worn:
        raise ValueError(f"{path} was saved with {told}, but the model wears {worn}")
    if any(layer.merged for layer in lora_layers(model).values()):
        raise ValueError("the model is merged with an adapter: call merge_lora(model, merged=False) first")
    theirs, mine = ({(name, weight.shape) for name, weight in weights.items()} for weights in (saved, ours))
    if wrong := sorted({name for name, _ in theirs ^ mine}):
        raise ValueError(f"{path} does not fit the model: {', '.join(wrong[:3])} and {len(wrong)} in all")
    for name, weight in ours.items():
        weight.copy_(saved[name])
