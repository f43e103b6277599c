"""The shared code of the book, one idea per file; the map below is the order in which the reader builds it."""

CHAPTERS = {
    "download": "setup",
    "resources": "setup",
    "hardware": "setup",
    "cli": "setup",
    "tokenizer": "ch02",
    "data": "ch02",
    "linear": "ch03",
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
    "schedule": "appendix-D",
}
