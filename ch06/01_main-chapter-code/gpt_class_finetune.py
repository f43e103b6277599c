"""Turn a pretrained GPT into a spam classifier. Without arguments: mini on the bundled SMS messages, three seeds."""

import argparse
import statistics

from llm_shared.classify import (
    GPTClassifier,
    balance,
    classify,
    finetune_classifier,
    read_messages,
    save_classifier,
    split,
)
from llm_shared.cli import positive_float, positive_int, run
from llm_shared.hardware import keep_freed_memory, pick_device, pick_dtype
from llm_shared.schedule import warmup_cosine
from llm_shared.weights import open_model
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="bundled", help="bundled, uci, or a CSV file with the columns text and label")
    parser.add_argument("--unbalanced", action="store_true", help="keep all messages that are no spam")
    parser.add_argument("--model", default="mini", help="a pretrained model, or the folder of a checkpoint")
    parser.add_argument("--layers", nargs="+", default=["all"], help="what trains, such as gpt.blocks.3 gpt.ln_f head")
    parser.add_argument("--max-length", type=positive_int, default=128, help="tokens read of a message")
    parser.add_argument("--epochs", type=positive_int, default=5, help="passes over the training messages")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="messages per step")
    parser.add_argument("--lr", type=positive_float, default=5e-4, help="peak learning rate")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs, each with its own split, order and head")
    parser.add_argument(
        "--message", default="You have won a free prize! Call now to claim your cash.", help="to classify"
    )
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="type of the products")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--out", default="runs/spam.safetensors", help="file for the last classifier")
    return vars(parser.parse_args())


def schedule(lr, steps):
    return warmup_cosine(lr, steps // 10, steps)


def rival(table, seed):
    """Return the accuracy of TF-IDF and logistic regression on the same split."""
    train, _, test = split(table, seed)
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(train.text, train.label)
    return model.score(test.text, test.label)


def main():
    args = parse_args()
    data, unbalanced, name, seeds, message, out = map(args.pop, "data unbalanced model seeds message out".split())
    device = pick_device(args.pop("device"))
    dtype, accuracies, rivals = pick_dtype(args.pop("dtype"), device), [], []
    table = read_messages(data)
    keep_freed_memory()
    for seed in range(seeds):
        torch.manual_seed(seed)
        gpt, tokenizer = open_model(name, device)
        model = GPTClassifier(gpt).to(device)
        before = classify(model, tokenizer, message)[1]
        rows = table if unbalanced else balance(table, seed)
        _, test = finetune_classifier(model, tokenizer, rows, seed=seed, dtype=dtype, schedule=schedule, **args)
        accuracies.append(test.pop("accuracy"))
        rivals.append(rival(rows, seed))
        print(f"seed {seed}: test accuracy {accuracies[-1]:.1%} (TF-IDF {rivals[-1]:.1%}), {test}")
    means = [statistics.mean(numbers) for numbers in (accuracies, rivals)]
    print("mean test accuracy of {} seeds: {:.1%} (TF-IDF {:.1%})".format(seeds, *means))
    save_classifier(out, model)
    after = classify(model, tokenizer, message)[1]
    print(f"{message!r}: spam with {before:.1%} before, {after:.1%} after; the classifier is in {out}")


if __name__ == "__main__":
    run(main)
