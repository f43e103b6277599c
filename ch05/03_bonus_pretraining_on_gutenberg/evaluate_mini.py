"""Print how well a pretrained model predicts the ends of the books, which were kept from its training."""

import argparse
import math
from itertools import chain
from pathlib import Path

from llm_shared.cli import run
from llm_shared.data import create_dataloader, read_blocks
from llm_shared.gpt import CONFIGS, GPTModel
from llm_shared.hardware import keep_freed_memory, pick_device, pick_dtype
from llm_shared.loss import bits_per_byte, evaluate
from llm_shared.tokenizer import gpt2_tokenizer
from llm_shared.weights import open_model
import numpy as np


def measure(model, tokenizer, text_path):
    """Return (loss in nats per token, bits per byte, number of tokens) of a text, in windows of 256 tokens without overlap.

    The tokenizer is the model's own; models with different ones are compared by their bits per byte.
    """
    blocks = read_blocks(text_path, tokenizer.special_tokens_set)
    blocks = (tokenizer.encode(block, allowed_special="all") for block in blocks)
    tokens = np.fromiter(chain.from_iterable(blocks), np.int64)
    loader = create_dataloader(tokens, batch_size=8, context_length=256, stride=256, shuffle=False)
    device = model.tok_emb.weight.device
    loss = evaluate(model, loader, dtype=pick_dtype("auto", device))
    return loss, bits_per_byte(loss, len(tokens), Path(text_path).stat().st_size), len(tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", default="mini", help="random, a folder of gpt_train.py, or a pretrained model by name"
    )
    parser.add_argument(
        "--text", default="runs/books/held-out.txt", help="UTF-8 text; prepare_books.py writes this one"
    )
    args = parser.parse_args()
    keep_freed_memory()
    device = pick_device("auto")
    if args.model == "random":
        model, tokenizer = GPTModel(CONFIGS["mini"]).to(device), gpt2_tokenizer()
    else:
        model, tokenizer = open_model(args.model, device)
    loss, bits, n_tokens = measure(model, tokenizer, args.text)
    print(f"{args.model} on {n_tokens:,} tokens of {Path(args.text).name}:")
    print(f"loss {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}, {bits:.3f} bits per byte")


if __name__ == "__main__":
    run(main)
