"""ch05 · Pretrained weights into a GPTModel: this project's own mini, or OpenAI's GPT-2."""

from collections import Counter

from llm_shared.checkpoint import build_model, load_model, read_safetensors
from llm_shared.gpt import CONFIGS
from llm_shared.resources import fetch
from llm_shared.tokenizer import gpt2_tokenizer
import torch

GPT2_NAMES = {  # a piece of OpenAI's name: the same piece of ours
    "wte.": "tok_emb.", "wpe.": "pos_emb.", "h.": "blocks.", "attn.c_attn.": "attn.qkv.", "attn.c_proj.": "attn.out_proj.",
    "mlp.c_fc.": "ffn.up.", "mlp.c_proj.": "ffn.down.",
}  # fmt: skip


def unpack_int8(weights):
    """Return weights with each int8 matrix (rows, columns) times its scale (rows, 1); a widowed one is a ValueError."""
    scales = {name.removesuffix(".scale"): scale for name, scale in weights.items() if name.endswith(".scale")}
    unpacked = {name: weight for name, weight in weights.items() if not name.endswith(".scale")}
    packed = {name: (*weight.shape[:1], 1) for name, weight in unpacked.items() if weight.dtype == torch.int8}
    if packed != {name: scale.shape for name, scale in scales.items()}:
        raise ValueError("an int8 matrix and its scale, one number a row, do not belong together")
    return unpacked | {name: unpacked[name] * scale for name, scale in scales.items()}


def transposed_in_gpt2(name):
    """Tell whether OpenAI's GPT-2 holds the weight of this name, theirs, as (d_in, d_out) instead of (d_out, d_in)."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def unique(pairs):
    """Return dict(pairs); a name that comes twice is a ValueError, because one of its values would be lost."""
    pairs = list(pairs)
    counts = Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"the name {counts.most_common(1)[0][0]!r} comes twice")
    return dict(pairs)


def tied(weights):
    """Return weights, under our names, without the head, which has to equal the embedding; another one is a ValueError."""
    head, embedding = weights.get("lm_head.weight"), weights.get("tok_emb.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError("the output head has weights of its own: GPTModel ties it to the embedding")
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


def from_gpt2(weights):
    """Return OpenAI's GPT-2 weights under our names, without masks, some turned round; what cannot be is a ValueError."""
    ours = []
    for name, weight in weights.items():
        name = name.removeprefix("transformer.")  # transformers writes one
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if not weight.is_floating_point():
            raise ValueError(f"{name} holds {weight.dtype}: whole numbers, no weights")
        weight = weight.T if transposed_in_gpt2(name) and weight.ndim == 2 else weight
        for theirs, our in GPT2_NAMES.items():
            name = name.replace(theirs, our)
        ours.append((name, weight))
    return tied(unique(ours))


def load_pretrained(name, device="cpu", dtype=torch.float32):
    """Return the pretrained GPTModel called name: "mini" comes with the package, GPT-2 is downloaded once, and mapped."""
    path = fetch(f"{name}/model.safetensors")
    weights = read_safetensors(path, device)
    weights = unpack_int8(weights) if name == "mini" else from_gpt2(weights)
    return build_model(CONFIGS[name], weights, path, dtype)


def open_model(source, device="cpu", dtype=torch.float32):
    """Return (model, tokenizer): a pretrained model by its name in CONFIGS, or what `load_model` finds in a folder."""
    if source in CONFIGS:
        return load_pretrained(source, device, dtype), gpt2_tokenizer()
    return load_model(source, device, dtype)
