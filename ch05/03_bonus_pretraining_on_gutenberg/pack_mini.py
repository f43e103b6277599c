"""Pack a trained checkpoint into the small file that the package carries: the embedding in int8, the rest in bfloat16."""

import argparse
from dataclasses import replace
from pathlib import Path

from llm_shared.checkpoint import fingerprint, load_model, own_weights
from llm_shared.cli import run
from llm_shared.gpt import CONFIGS
from llm_shared.resources import write_safetensors
from llm_shared.tokenizer import gpt2_tokenizer
import torch


def pack_int8(weight):
    """Return weight (rows, columns) as int8 and the scale (rows, 1) that brings it back: 127 stands for the row's largest."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    return (weight / scale).round().to(torch.int8), scale


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/mini", help="folder that gpt_train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("llm_shared/assets/mini/model.safetensors"))
    args = parser.parse_args()
    model, tokenizer = load_model(args.checkpoint)
    if replace(model.config, dropout=0.0) != CONFIGS["mini"] or fingerprint(tokenizer) != fingerprint(gpt2_tokenizer()):
        raise ValueError(f"{args.checkpoint} is no mini: mini has {CONFIGS['mini']} and GPT-2's tokenizer")
    weights = {name: weight.bfloat16() for name, weight in own_weights(model).items()}
    weights["tok_emb.weight"], weights["tok_emb.weight.scale"] = pack_int8(model.tok_emb.weight.detach())
    write_safetensors(args.out, weights)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
