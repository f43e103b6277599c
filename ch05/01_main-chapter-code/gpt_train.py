"""Pretrain a GPT on a text file. Without arguments: a small one on Moby-Dick, in a few minutes on a laptop."""

import argparse
from dataclasses import fields

from llm_shared.cli import natural, non_negative, number, positive_float, positive_int, run
from llm_shared.gpt import CONFIGS
from llm_shared.pretrain import PretrainSettings, pretrain
from llm_shared.schedule import warmup_cosine


def parse_args():
    share = number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
    dropout = number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="UTF-8 text file to learn from")
    parser.add_argument("--tokenizer", help="gpt2, or a file that BPETokenizer.save wrote")
    parser.add_argument("--model", choices=CONFIGS, help="size of the model")
    parser.add_argument("--context-length", type=positive_int, help="tokens the model sees; None: the model's own")
    parser.add_argument("--dropout", type=dropout, help="share of activations dropped while training")
    parser.add_argument("--steps", type=positive_int, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive_int, help="windows per batch")
    parser.add_argument("--accumulate", type=positive_int, help="batches per step")
    parser.add_argument("--lr", type=positive_float, help="peak learning rate")
    parser.add_argument(
        "--warmup-steps", type=natural, default=50, help="steps until the peak; then down half a cosine"
    )
    parser.add_argument("--weight-decay", type=non_negative, help="decay of the matrices")
    parser.add_argument("--clip", type=positive_float, help="largest gradient norm")
    parser.add_argument("--val-fraction", type=share, help="share of the text, at its end, kept for validation")
    parser.add_argument("--eval-every", type=positive_int, help="steps between evaluations with checkpoint and sample")
    parser.add_argument("--seed", type=natural, help="seed of weights, order and samples")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help="number type of the products")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    parser.set_defaults(**{field.name: field.default for field in fields(PretrainSettings)})
    parser.add_argument("--out", default="runs/pretrain", help="folder for checkpoint and loss curve")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return vars(parser.parse_args())


def main():
    args = parse_args()
    out, resume, device, warmup_steps = (args.pop(name) for name in ("out", "resume", "device", "warmup_steps"))
    pretrain(PretrainSettings(**args), out, warmup_cosine, device, resume, warmup_steps=warmup_steps)


if __name__ == "__main__":
    run(main)
