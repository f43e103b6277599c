"""Continue a prompt with a trained GPT, token by token as they come."""

import argparse

from llm_shared.cli import natural, non_negative, number, positive_int, run
from llm_shared.generate import stream, stream_text
from llm_shared.hardware import pick_device, pick_dtype
from llm_shared.tokenizer import check_text
from llm_shared.weights import open_model
import torch


def parse_args():
    top_p = number(float, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/pretrain", help="folder of a run, or a pretrained model: mini, …")
    parser.add_argument("--prompt", default="The whale", help="text to continue; empty: from <|endoftext|>")
    parser.add_argument("--max-new-tokens", type=natural, default=100, help="tokens to write at most")
    parser.add_argument("--temperature", type=non_negative, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=positive_int, default=50, help="draw among the k likeliest tokens")
    parser.add_argument("--top-p", type=top_p, help="draw among the likeliest tokens that together reach p")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the draws")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="float32", help="number type")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    model, tokenizer = open_model(args.checkpoint, device, pick_dtype(args.dtype, device))
    steps = stream(
        model,
        [tokenizer.encode_ordinary(check_text(args.prompt))],
        args.max_new_tokens,
        eot_id=tokenizer.eot_token,
        generator=torch.Generator(device).manual_seed(args.seed),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    print(args.prompt, end="", flush=True)
    for text in stream_text(tokenizer, (new for (new,) in steps)):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
