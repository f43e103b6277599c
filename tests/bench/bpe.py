"""Speed of the tokenizer, in pure Python, against Rust: python tests/bench/bpe.py [TEXT …]  (10 MB of UTF-8 text)"""

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

from llm_shared.resources import fetch
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
import tiktoken
from harness import record
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def train_hf(text, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)


def medians(contenders, rounds):
    """Return {name: median seconds}, the contenders taking turns in this process."""
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="*", type=Path, default=[fetch("moby-dick.txt")])
    text = "".join(path.read_text(encoding="utf-8") for path in parser.parse_args().text)
    text = (text * (10_000_000 // len(text) + 1))[:10_000_000]

    for vocab_size in (1000, 5000):
        contenders = {
            "ours": partial(BPETokenizer.train, text[:1_000_000], vocab_size),
            "HF tokenizers (Rust)": partial(train_hf, text[:1_000_000], vocab_size),
        }
        record("bpe", f"BPE training, 1 MB, vocabulary {vocab_size:,}", medians(contenders, 7))

    ranks = gpt2_tokenizer()._mergeable_ranks
    shipped = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    ours = BPETokenizer.load(fetch("gpt2/vocab.bpe"))
    assert ours.encode_ordinary(text) == shipped.encode_ordinary(text)
    contenders = {"ours": lambda: ours.encode_ordinary(text), "tiktoken (Rust)": lambda: shipped.encode_ordinary(text)}
    record("bpe", "BPE encoding, 10 MB, warm cache", medians(contenders, 7))
    contenders["ours"] = lambda: BPETokenizer(ours.merges).encode_ordinary(text)
    record("bpe", "BPE encoding, 10 MB, cold cache", medians(contenders, 3))

    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    for kind, word in {
        "one letter": "a" * 100_000,
        "random letters": letters,
        "one syllable": "nghiêng" * 14_286,
    }.items():
        word = word[:100_000]
        assert ours.encode_ordinary(word) == shipped.encode_ordinary(word)
        contenders = {  # nothing is remembered of a word this long
            "ours": partial(ours.encode_ordinary, word),
            "tiktoken (Rust)": partial(shipped.encode_ordinary, word),
        }
        record("bpe", f"BPE encoding, a word of 100,000 characters, {kind}", medians(contenders, 21))


if __name__ == "__main__":
    main()
