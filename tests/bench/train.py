"""Speed of a training step against the peers: python tests/bench/train.py"""

import argparse

from llm_shared import WAITING
from llm_shared.gpt import CONFIGS, GPTModel
import torch
from harness import Contender, race, record
from models import BATCH


def step_flops(size):
    """Operations of a step that any implementation must do: 6 a weight and token, and attention's two products."""
    config, tokens = CONFIGS[size], BATCH[size] * 256
    with torch.device("meta"):
        weights = sum(w.numel() for name, w in GPTModel(config).named_parameters() if "pos_emb" not in name)
    attention = 6 * config.n_layer * config.n_embd * 256  # causal: half of the products
    return tokens * (6 * weights + attention)


def contenders(size, dtype, grant):
    """Return the contenders; grant: the peers keep freed memory and wait quietly too."""
    args = (size, dtype)
    peers = {
        "transformers": ("models:train_transformers", args),
        "litgpt": ("models:train_litgpt", args),
        "llms-from-scratch": ("models:train_rasbt", args),
        "llms-from-scratch fast": ("models:train_rasbt", (*args, "GPTModelFast")),
    }
    if dtype == "bfloat16":
        weights = (*args, "GPTModelFast", "bfloat16")
        peers["llms-from-scratch fast, bfloat16 weights"] = ("models:train_rasbt", weights)
    found = {name: Contender(*peer, keep=grant, waiting=WAITING if grant else {}) for name, peer in peers.items()}
    found["peak"] = Contender("harness:large_product", (dtype,))
    return found | {"ours": Contender("models:train_ours", args, keep=True, waiting=WAITING)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for size in options.sizes:
        for name in options.dtypes:
            for grant, how in ((False, "as shipped"), (True, "all with our settings")):
                times = race(contenders(size, name, grant), options.rounds)
                limit = times.pop("peak") * step_flops(size) / (2 * 3072**3)
                record("train", f"training step, {size}, {BATCH[size]}×256, {name}, {how}", times, limit)
