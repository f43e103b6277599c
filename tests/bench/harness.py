"""Measure contenders against each other: each in a process of its own, taking turns, so that noise hits all alike."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from llm_shared import WAITING
from llm_shared.hardware import processor_kind
import torch

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("worker.py")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Contender(NamedTuple):
    """What to build and run: "module:function", its arguments, and which of this project's settings it is granted."""

    factory: str
    args: tuple = ()
    keep: bool = False  # keep_freed_memory()
    waiting: dict = {}  # how its threads wait, such as llm_shared.WAITING; OpenMP's default: they spin


def start(contender):
    """Start a contender's process."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, str(WORKER), json.dumps([contender.factory, contender.args, contender.keep])]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment | contender.waiting)


def race(contenders, rounds, warmup=2):
    """Return {name: median seconds of one run}; contenders: {name: Contender}."""
    workers = {name: start(contender) for name, contender in contenders.items()}
    times = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, process in workers.items():
            print(file=process.stdin, flush=True)
            seconds = float(process.stdout.readline())
            if turn >= warmup:
                times[name].append(seconds)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def large_product(dtype):
    """A product of two large matrices, 2 × 3072³ operations: what the machine can compute."""
    a = torch.randn(3072, 3072).to(TYPES[dtype])
    return torch.inference_mode()(lambda: a @ a)


def long_read(dtype):
    """Sixteen matrices × vector, 16 × 3072² numbers, more than caches hold: what the machine can read."""
    matrices = [torch.randn(3072, 3072).to(TYPES[dtype]) for _ in range(16)]
    vector = torch.randn(3072).to(TYPES[dtype])
    return torch.inference_mode()(lambda: [matrix.mv(vector) for matrix in matrices])


def processor():
    """Return the name of this machine's processor, and whether it has AMX: the fastest way differs."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return f"{name}, {'AMX' if processor_kind() == 'amx' else 'no AMX'}"


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
    found = {"command": command, "machine": machine, "limit": limit, "seconds": times, "memory": memory}
    races.setdefault(title, {})[processor()] = found
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(races, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(title, {processor(): found}), flush=True)


def lead(seconds):
    """Return how many times as fast as the fastest peer ours is."""
    return min(time_taken for name, time_taken in seconds.items() if not name.startswith("ours")) / seconds["ours"]


def share(race, name):
    """Return the share of the machine's peak that a contender reached, or its peak memory over the weights, as text."""
    if race.get("memory"):
        return f"{race['memory'][name]:.2f}"
    return f"{race['limit'] / race['seconds'][name]:.0%}" if race["limit"] else ""


def table(title, races):
    """Return the races of one title, {processor: race}, as Markdown: speed relative to ours, and share of peak or memory."""
    last = "peak memory / weights" if any(race.get("memory") for race in races.values()) else "share of peak"
    columns, dashes = f" speed / ours | {last} |" * len(races), "|---|" + "---:|---:|" * len(races)
    lines = [f"**{title}**", "", "| contender |" + columns, dashes]
    if len(races) > 1:
        lines[2:] = ["| |" + "".join(f" {processor} | |" for processor in races), dashes, "| contender |" + columns]
    best = max(races.values(), key=lambda race: len(race["seconds"]))["seconds"]
    for name in sorted(best, key=best.get):
        cells = ""
        for race in races.values():
            there = name in race["seconds"]
            cells += (
                f" {race['seconds']['ours'] / race['seconds'][name]:.2f} | {share(race, name)} |" if there else " | |"
            )
        lines.append(f"| {name} |{cells}")
    for processor, race in races.items():
        lead_text = f"ours / fastest peer: {lead(race['seconds']):.2f}×"
        lines += ["", f"{processor}: {lead_text} · `{race['command']}` · {race['machine']}"]
    return "\n".join([*lines, ""])
