"""Speed of greedy generation, 32 + 128 tokens, against the peers: python tests/bench/generate.py"""

import argparse

from llm_shared import WAITING
from llm_shared.gpt import CONFIGS, GPTModel
import torch
from harness import Contender, race, record
from models import NEW_TOKENS

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=CONFIGS, default="gpt2-small (124M)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for rows in options.rows:
        for name in options.dtypes:
            with torch.device("meta"):
                weights = sum(weight.numel() for weight in GPTModel(CONFIGS[options.size]).parameters())
            args = (options.size, name, rows)
            for grant, how in ((False, "as shipped"), (True, "all with our settings")):
                peers = ("transformers", "litgpt")
                found = {
                    peer: Contender(f"models:generate_{peer}", args, grant, WAITING if grant else {}) for peer in peers
                }
                found["peak"] = Contender("harness:long_read", (name,))
                found["ours"] = Contender("models:generate_ours", args, grant, WAITING)
                times = race(found, options.rounds, warmup=1)
                limit = times.pop("peak") * NEW_TOKENS * weights / (16 * 3072**2)  # each weight read once a token
                record("generate", f"generation, {options.size}, {rows} rows, {name}, {how}", times, limit)
