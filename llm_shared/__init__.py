"""The shared code of the book, one idea per file; the map below is the order in which the reader builds it."""

import os

# OpenMP's threads spin for a moment, then sleep (tests/bench/busy.py); it counts only if torch is imported after this.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
if WAITING.keys().isdisjoint(os.environ):
    os.environ.update(WAITING)

CHAPTERS = {
    "download": "setup",
    "resources": "setup",
    "archive": "setup",
    "hardware": "setup",
    "cli": "setup",
    "results": "setup",
    "linear": "setup",
    "symbols": "ch02",
    "tokenizer": "ch02",
    "data": "ch02",
    "attention": "ch03",
    "gpt": "ch04",
    "generate": "ch05",
    "loss": "ch05",
    "training": "ch05",
    "checkpoint": "ch05",
    "pretrain": "ch05",
    "weights": "ch05",
    "hf_format": "ch05",
    "gguf_format": "ch05",
    "tf_format": "ch05",
    "classify": "ch06",
    "schedule": "appendix-D",
    "lora": "appendix-E",
}
