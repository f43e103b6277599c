"""Which way round to multiply a few rows, one step of a 124M model for each: python tests/bench/linear.py"""

import argparse
import statistics
import time

import llm_shared.gpt
import llm_shared.linear
from llm_shared.gpt import CONFIGS, GPTModel

import torch
import torch.nn.functional as F

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def turned(x, weight, bias=None):
    """weight @ x.T at any number of rows."""
    y = (weight @ x.flatten(0, 1).T).T.contiguous()
    return (y if bias is None else y.add_(bias)).view(*x.shape[:2], -1)


def step_times(model, rows, rounds):
    """Return {way: median seconds of one decoding step of `rows` rows after 100 tokens}, the ways taking turns."""
    ways = {"linear": llm_shared.linear.linear, "F.linear": F.linear, "turned": turned}
    times = {way: [] for way in ways}
    caches = model.make_caches(rows, 101)
    model(torch.randint(50257, (rows, 100)), caches, last_only=True)
    for _ in range(rounds):
        for way, function in ways.items():
            llm_shared.linear.linear = llm_shared.gpt.linear = function
            for cache in caches:
                cache.length = 100
            started = time.perf_counter()
            model(torch.zeros(rows, 1, dtype=torch.long), caches)
            times[way].append(time.perf_counter() - started)
    llm_shared.linear.linear = llm_shared.gpt.linear = ways["linear"]
    return {way: statistics.median(seconds) for way, seconds in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 6, 7, 8, 12, 16, 17, 24, 32, 64, 65])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print("| rows | type | linear / F.linear | turned / F.linear |\n|---:|---|---:|---:|")
    for name, dtype in TYPES.items():
        model = GPTModel(CONFIGS["gpt2-small (124M)"]).to(dtype).eval()
        for rows in options.rows:
            with torch.inference_mode():
                seconds = step_times(model, rows, options.rounds)
            usual = seconds["F.linear"]
            print(
                f"| {rows} | {name} | {usual / seconds['linear']:.2f} | {usual / seconds['turned']:.2f} |", flush=True
            )
