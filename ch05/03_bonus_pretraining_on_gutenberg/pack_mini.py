"""Pack a trained checkpoint into the small file that the package carries: the embedding in int8, the rest in bfloat16."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_shared.checkpoint import load_model
from llm_shared.cli import run
from llm_shared.resources import replacing


def pack_int8(weight):
    """Return weight (rows, columns) as int8 and the scale (rows, 1) that brings it back: 127 stands for the row's largest."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    return (weight / scale).round().to(torch.int8), scale


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/mini", help="folder that gpt_train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("llm_shared/assets/mini/model.safetensors"))
    args = parser.parse_args()
    model, _ = load_model(args.checkpoint)
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    weights["tok_emb.weight"], weights["tok_emb.weight.scale"] = pack_int8(model.tok_emb.weight.detach())
    with replacing(args.out) as temporary:
        save_file(weights, temporary)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
