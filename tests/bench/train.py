"""Speed of a training step against the peers: python tests/bench/train.py"""

import argparse

import torch
from harness import race, record
from models import BATCH

from llm_shared.gpt import CONFIGS, GPTModel

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def step_flops(size):
    """Operations of a step that any implementation must do: 6 a weight and token, and attention's two products."""
    config, tokens = CONFIGS[size], BATCH[size] * 256
    with torch.device("meta"):
        weights = sum(w.numel() for name, w in GPTModel(config).named_parameters() if "pos_emb" not in name)
    attention = 6 * config.n_layer * config.n_embd * 256  # causal: half of the products
    return tokens * (6 * weights + attention)


def contenders(size, dtype, keep):
    args = (size, dtype)
    found = {
        "peak": ("harness:large_product", (dtype,), False),
        "ours": ("models:train_ours", args, True),
        "transformers": ("models:train_transformers", args, keep),
        "litgpt": ("models:train_litgpt", args, keep),
        "llms-from-scratch": ("models:train_rasbt", args, keep),
        "llms-from-scratch fast": ("models:train_rasbt", (*args, "GPTModelFast"), keep),
    }
    if dtype == torch.bfloat16:
        weights = (*args, "GPTModelFast", torch.bfloat16)
        found["llms-from-scratch fast, bfloat16 weights"] = ("models:train_rasbt", weights, keep)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for size in options.sizes:
        for name in options.dtypes:
            for keep, how in ((False, "as shipped"), (True, "all keep freed memory")):
                times = race(contenders(size, TYPES[name], keep), options.rounds)
                limit = times.pop("peak") * step_flops(size) / (2 * 3072**3)
                record("train", f"training step, {size}, {BATCH[size]}×256, {name}, {how}", times, limit)
