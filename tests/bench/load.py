"""Loading a GPT-2 file in a fresh process, first token included, against transformers: python tests/bench/load.py"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from llm_shared.gpt import CONFIGS
import torch
from harness import record
from models import transformers_model

PROGRAM = r"""
import json, re, sys, time
from pathlib import Path
import torch
{imports}

def kilobytes(what):
    return int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

before = kilobytes("VmRSS")
torch.set_grad_enabled(False)
started = time.perf_counter()
model = {load}
loaded = time.perf_counter()
model.eval()(torch.tensor([[464, 2266]]))
first_token = time.perf_counter()
peak = kilobytes("VmHWM")  # ru_maxrss would start from the parent's
weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
print(json.dumps([loaded - started, first_token - started, (peak - before) * 1024 / weights]))
"""
CONTENDERS = {  # what each imports beforehand, and how it loads the folder sys.argv[1] as the size sys.argv[2]
    "ours": (
        "from llm_shared import weights; weights.fetch = lambda name: Path(sys.argv[1], 'model.safetensors')",
        "weights.load_pretrained(sys.argv[2])",
    ),
    "transformers": (
        "from transformers import GPT2LMHeadModel; GPT2LMHeadModel",
        "GPT2LMHeadModel.from_pretrained(sys.argv[1])",
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=["gpt2-small (124M)", "gpt2-medium (355M)"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            transformers_model(size).save_pretrained(folder)
            found = {name: [] for name in CONTENDERS}
            for _ in range(options.rounds):
                for name, (imports, load) in CONTENDERS.items():
                    program = PROGRAM.format(imports=imports, load=load)
                    command = [sys.executable, "-c", program, folder, size]
                    result = subprocess.run(command, capture_output=True, text=True, check=True)
                    found[name].append(json.loads(result.stdout))
        medians = {
            name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()
        }
        memory = {name: values[2] for name, values in medians.items()}
        for column, what in enumerate(("loaded", "first token")):
            times = {name: values[column] for name, values in medians.items()}
            record("load", f"from the file to {what}, {size}, float32", times, memory=memory)


if __name__ == "__main__":
    main()
