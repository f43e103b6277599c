"""Which way to multiply few rows, by shape and type, against F.linear: python tests/bench/linear.py"""

import argparse
import statistics
import time

from llm_shared.hardware import processor_kind
from llm_shared.linear import way
import torch
import torch.nn.functional as F

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def turned(x, weight, bias):
    """weight @ x.T at any number of rows, one row as two."""
    rows = x.flatten(0, 1) if len(x) > 1 else x.flatten(0, 1).repeat(2, 1)
    return (weight @ rows.T).T[: len(x)].contiguous().add_(bias)


def speeds(shape, dtype, rows, rounds):
    """Return {way: speed relative to F.linear}; the ways take turns over matrices that together fit no cache."""
    count = max(1, min(12, 200_000_000 // (shape[0] * shape[1] * dtype.itemsize)))
    weights = [torch.randn(shape).to(dtype) for _ in range(count)]
    x, bias = torch.randn(rows, 1, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    ways = {"plain": F.linear, "turned": turned}
    if rows == 1:
        ways["vector"] = lambda x, weight, bias: torch.addmv(bias, weight, x.flatten())
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            started = time.perf_counter()
            for weight in weights:
                function(x, weight, bias)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {name: medians["plain"] / seconds for name, seconds in medians.items() if name != "plain"}


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 5, 7, 8, 9, 16, 32, 64])
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 768], help="n_embd of the models")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"processor kind: {processor_kind()}; in brackets what `linear` does\n")
    print("| weight | type | rows | speed / F.linear |\n|---|---|---:|---|")
    for d in options.widths:
        for shape in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (50257, d)):
            for name, dtype in TYPES.items():
                for rows in options.rows:
                    found = speeds(shape, dtype, rows, options.rounds)
                    text = ", ".join(f"{how} {speed:.2f}" for how, speed in found.items())
                    chosen = way(rows, torch.empty(shape, dtype=dtype, device="meta"))
                    print(f"| {shape[0]} × {shape[1]} | {name} | {rows} | {text} ({chosen}) |", flush=True)


if __name__ == "__main__":
    main()
