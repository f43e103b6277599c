"""Fine-tune mini and a model with random weights in the same steps, on three tasks; write the table of both READMEs."""

import json
import math
import random
import statistics
from functools import partial
from pathlib import Path

from llm_shared.classify import GPTClassifier, balance, finetune_classifier, read_messages
from llm_shared.cli import run
from llm_shared.data import EpochOrder
from llm_shared.gpt import CONFIGS, GPTModel
from llm_shared.hardware import keep_freed_memory, pick_dtype
from llm_shared.loss import IGNORED, next_token_loss
from llm_shared.resources import fetch, replacing
from llm_shared.results import write_results
from llm_shared.tokenizer import gpt2_tokenizer
from llm_shared.training import make_optimizer, train
from llm_shared.weights import load_pretrained
import torch
from evaluate_mini import measure
from prepare_books import read_book
from torch.utils.data import DataLoader

HERE = Path(__file__).parent
HELD_OUT = Path("runs/books/held-out.txt")
SEEDS, STEPS, EPOCHS, BATCH, LENGTH, LR = 3, 100, 2, 16, 64, 5e-4  # two epochs of the messages are 100 steps
PARTS = {"last block": ["gpt.blocks.3", "gpt.ln_f", "head"], "all": ["all"]}  # as chapter 6 trains, and all weights
CPU = torch.device("cpu")


def instruction_data(seed):
    """Return (train, test) lists of (inputs, targets): four simple instructions about sentences of the held-out books.

    Only the answer and the <|endoftext|> after it count in the loss.
    """
    rng, tokenizer = random.Random(seed), gpt2_tokenizer()
    sentences = [s.strip() for s in HELD_OUT.read_text(encoding="utf-8").replace("\n", " ").split(". ")]
    sentences = [s for s in dict.fromkeys(sentences) if 4 <= len(s.split()) <= 14]  # none twice
    rng.shuffle(sentences)
    tasks = {
        "Give the first word of the sentence.": lambda s: s.split()[0],
        "Give the last word of the sentence.": lambda s: s.split()[-1],
        "Write the sentence in capital letters.": str.upper,
        "Copy the sentence.": str,
    }
    items = []
    for sentence in sentences[:600]:
        task = rng.choice(list(tasks))
        prompt = f"### Instruction:\n{task}\n\n### Input:\n{sentence}\n\n### Response:\n"
        question = tokenizer.encode_ordinary(prompt)
        answer = [*tokenizer.encode_ordinary(tasks[task](sentence)), tokenizer.eot_token]
        ids = torch.tensor([*question, *answer] + [tokenizer.eot_token] * LENGTH)[:LENGTH]
        targets = ids.clone()
        targets[: len(question)] = IGNORED
        targets[len(question) + len(answer) :] = IGNORED
        if len(question) < LENGTH:
            items.append((ids[:-1], targets[1:]))
    return items[:450], items[450:]


def instruction_loss(model, seed):
    """Train for STEPS steps; return the mean loss over the test set."""
    items, test = instruction_data(seed)
    loader = DataLoader(items, BATCH, sampler=EpochOrder(len(items), True, seed))
    history = train(
        model, make_optimizer(model, LR), loader, DataLoader(test, 32), STEPS, loss_fn=next_token_loss,
        dtype=pick_dtype("auto", CPU), eval_every=STEPS,
    )  # fmt: skip
    return history[-1]["val_loss"]


def spam_accuracy(gpt, layers, seed):
    """Fine-tune a GPT as chapter 6 does; return the accuracy on the test set."""
    table = balance(read_messages(), seed)
    _, test = finetune_classifier(
        GPTClassifier(gpt), gpt2_tokenizer(), table, layers=layers, max_length=LENGTH, batch_size=BATCH, epochs=EPOCHS,
        lr=LR, seed=seed, dtype=pick_dtype("auto", CPU),
    )  # fmt: skip
    return test["accuracy"]


def new_model(start, seed):
    torch.manual_seed(seed)
    return load_pretrained("mini") if start == "mini" else GPTModel(CONFIGS["mini"])


def results():
    """Return {start: {task: [number of each seed]}}."""
    found = {}
    moby = HELD_OUT.with_name("moby-dick-end.txt")
    text = read_book(fetch("moby-dick.txt"))
    moby.write_text(text[int(0.95 * len(text)) :], encoding="utf-8")
    for start in ("random", "mini"):
        model, tokenizer = new_model(start, 0), gpt2_tokenizer()
        held_out, moby_dick = (math.exp(measure(model, tokenizer, path)[0]) for path in (HELD_OUT, moby))
        rows = found[start] = {"held-out": [held_out], "moby-dick": [moby_dick]}
        rows |= {"spam, last block": [], "spam, all": [], "instruction": []}
        for seed in range(SEEDS):
            for part, layers in PARTS.items():
                rows[f"spam, {part}"].append(spam_accuracy(new_model(start, seed), layers, seed))
            rows["instruction"].append(instruction_loss(new_model(start, seed), seed))
            print(start, seed, {task: round(numbers[-1], 4) for task, numbers in rows.items()}, flush=True)
    return found


ROWS = {
    "held-out": ("perplexity, ends of the books", "perplexity, phần cuối các sách", "{:,.1f}"),
    "moby-dick": ("perplexity, last 5 % of *Moby-Dick*", "perplexity, 5 % cuối của *Moby-Dick*", "{:,.1f}"),
    "spam, last block": (
        "SMS spam, accuracy, last block trained",
        "tin nhắn rác, độ chính xác, chỉ dạy khối cuối",
        "{:.1%}",
    ),
    "spam, all": ("SMS spam, accuracy, all weights trained", "tin nhắn rác, độ chính xác, dạy mọi trọng số", "{:.1%}"),
    "instruction": ("loss, simple instructions", "loss, chỉ dẫn đơn giản", "{:.3f}"),
}


def table(found, language):
    """Return the results as Markdown; language: 0 English, 1 Vietnamese."""
    lines = [("| | random weights | mini |", "| | trọng số ngẫu nhiên | mini |")[language], "|---|---:|---:|"]
    for task, row in ROWS.items():
        cells = []
        for start in ("random", "mini"):
            numbers = found[start][task]
            cell = row[2].format(statistics.mean(numbers))
            cell += f" ± {row[2].format(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
            cells.append(cell.translate(str.maketrans(",.", ".,")) if language else cell)
        lines.append(f"| {row[language]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    keep_freed_memory()
    if not HELD_OUT.exists():
        raise ValueError(f"{HELD_OUT} is missing: run prepare_books.py first")
    found = results()
    with replacing(HERE / "results.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_results(HERE, partial(table, found))
    print(table(found, 0))


if __name__ == "__main__":
    run(main)
