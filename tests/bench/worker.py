"""One contender in a process of its own: builds it, then runs and times it at each line of standard input."""

import importlib
import json
import sys
import time

import torch  # before llm_shared: OpenMP reads how to wait from the environment that the harness gave

if __name__ == "__main__":
    factory, args, keep = json.loads(sys.argv[1])
    if keep:
        importlib.import_module("llm_shared.hardware").keep_freed_memory()
    module, name = factory.split(":")
    torch.manual_seed(0)
    run = getattr(importlib.import_module(module), name)(*args)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        print(time.perf_counter() - started, flush=True)
