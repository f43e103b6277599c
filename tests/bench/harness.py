"""Measure contenders against each other: each in a process of its own, taking turns, so that noise hits all alike."""

import importlib
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from llm_shared.hardware import keep_freed_memory

RESULTS = Path(__file__).parent / "results"


def work(connection, factory, args, keep):
    """Build one contender, then run and time it at each request."""
    if keep:
        keep_freed_memory()
    module, name = factory.split(":")
    torch.manual_seed(0)
    run = getattr(importlib.import_module(module), name)(*args)
    while connection.recv():
        started = time.perf_counter()
        run()
        connection.send(time.perf_counter() - started)


def race(contenders, rounds, warmup=2):
    """Return {name: median seconds of one run}; contenders: {name: (factory "module:function", args, keep memory)}."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, arguments in contenders.items():
        mine, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()  # so that a contender that dies is noticed
        workers[name] = (mine, process)
    times = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, (connection, _) in workers.items():
            connection.send(True)
            seconds = connection.recv()
            if turn >= warmup:
                times[name].append(seconds)
    for connection, process in workers.values():
        connection.send(False)
        process.join()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def large_product(dtype):
    """A product of two large matrices, 2 × 3072³ operations: what the machine can compute."""
    a = torch.randn(3072, 3072).to(dtype)
    return torch.inference_mode()(lambda: a @ a)


def long_read(dtype):
    """Sixteen matrices × vector, 16 × 3072² numbers, more than caches hold: what the machine can read."""
    matrices = [torch.randn(3072, 3072).to(dtype) for _ in range(16)]
    vector = torch.randn(3072).to(dtype)
    return torch.inference_mode()(lambda: [matrix.mv(vector) for matrix in matrices])


def record(kind, title, times, limit=None, memory=None):
    """Keep the medians of a race in results/<kind>.json, with the machine and the command, and print its table.

    limit: the seconds that the work would take at the peak measured in the same rounds; memory: {name: a ratio}.
    """
    path = RESULTS / f"{kind}.json"
    races = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    arguments = [Path(word).name if Path(word).is_file() else shlex.quote(word) for word in sys.argv[1:]]
    command = " ".join(["python", f"tests/bench/{Path(sys.argv[0]).name}", *arguments])
    machine = (
        f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    )
    races[title] = {"command": command, "machine": machine, "limit": limit, "seconds": times, "memory": memory}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(races, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(title, **races[title]), flush=True)


def table(title, command, machine, limit, seconds, memory=None):
    """Return a race as Markdown: from the fastest on, speed relative to ours, and the share of the machine's peak or memory."""
    last = "peak memory / weights" if memory else "share of peak"
    lines = [f"**{title}**", "", f"| contender | speed / ours | {last} |", "|---|---:|---:|"]
    for name, time_taken in sorted(seconds.items(), key=lambda item: item[1]):
        share = f"{memory[name]:.2f}" if memory else f"{limit / time_taken:.0%}" if limit else ""
        lines.append(f"| {name} | {seconds['ours'] / time_taken:.2f} | {share} |")
    fastest = min(time_taken for name, time_taken in seconds.items() if name != "ours")
    lines += ["", f"ours / fastest peer: {fastest / seconds['ours']:.2f}× · `{command}` · {machine}", ""]
    return "\n".join(lines)
