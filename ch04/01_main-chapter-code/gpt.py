"""Build a GPT with random weights, count them, and let it write: nonsense, until chapter 5 trains it."""

import argparse

from llm_shared.cli import natural, run
from llm_shared.generate import generate
from llm_shared.gpt import CONFIGS, GPTModel
from llm_shared.tokenizer import gpt2_tokenizer
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="gpt2-small (124M)", help="size of the model")
    parser.add_argument("--prompt", default="Hello, I am", help="text to continue")
    parser.add_argument("--max-new-tokens", type=natural, default=10, help="tokens to write")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the random weights")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = GPTModel(CONFIGS[args.model]).eval()
    n_weights = sum(weight.numel() for weight in model.parameters())
    print(f"{args.model}: {n_weights:,} weights, {n_weights * 4 / 2**20:,.1f} MiB in float32")

    tokenizer = gpt2_tokenizer()
    prompt = tokenizer.encode_ordinary(args.prompt)
    ids = generate(model, [prompt], args.max_new_tokens, eot_id=tokenizer.eot_token)[0]
    print(f"ids in:  {prompt}\nids out: {ids}\ntext:    {tokenizer.decode(ids)!r}")


if __name__ == "__main__":
    run(main)
