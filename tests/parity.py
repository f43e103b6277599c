"""transformers' GPT-2 and ours, with the same weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

NAMES = {
    "wte": "tok_emb",
    "wpe": "pos_emb",
    "ln_f": "ln_f",
    "ln_1": "ln_1",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.out_proj",
    "ln_2": "ln_2",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}


def hf_model(config):
    """transformers' GPT-2 of the same shape, with its own random weights; biases and norms shaken, so that each counts."""
    hf_config = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.n_embd, n_head=config.n_head,
        n_layer=config.n_layer, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(hf_config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
        if not config.qkv_bias:
            for block in model.transformer.h:
                block.attn.c_attn.bias.zero_()
    return model


def pairs(hf, ours):
    """Yield (their weight, ours, whether theirs is transposed) for every weight of both."""
    theirs = dict(hf.transformer.named_parameters())
    for name, weight in ours.named_parameters():
        block, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
        part, _, kind = rest.rpartition(".")
        their_part = next(their for their, our in NAMES.items() if our == part)
        their_name = f"h.{block}.{their_part}.{kind}" if block else f"{their_part}.{kind}"
        linear = kind == "weight" and part.startswith(("attn", "ffn"))
        yield theirs.pop(their_name), weight, linear
    left = [name for name in theirs if not name.endswith("c_attn.bias")]
    assert not left, left


@torch.no_grad()
def copy_from_hf(hf, ours):
    for their, our, transposed in pairs(hf, ours):
        our.copy_(their.T if transposed else their)
    return ours


@torch.no_grad()
def copy_to_hf(ours, hf):
    for their, our, transposed in pairs(hf, ours):
        their.copy_(our.T if transposed else our)
    return hf
