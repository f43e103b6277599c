"""Fine-tune mini and a model with random weights in the same steps, on three tasks; write the table of both READMEs."""

import json
import math
import random
import statistics
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from evaluate_mini import measure
from prepare_books import read_book
from torch.utils.data import DataLoader

from llm_shared.cli import run
from llm_shared.data import EpochOrder
from llm_shared.gpt import CONFIGS, GPTModel
from llm_shared.hardware import keep_freed_memory, pick_dtype
from llm_shared.loss import IGNORED, next_token_loss
from llm_shared.resources import fetch
from llm_shared.tokenizer import gpt2_tokenizer
from llm_shared.training import make_optimizer, train
from llm_shared.weights import load_pretrained

HERE = Path(__file__).parent
HELD_OUT = Path("runs/books/held-out.txt")
SEEDS, STEPS, BATCH, LENGTH, LR = 3, 100, 16, 64, 5e-4
START, END = "<!-- results -->", "<!-- end of results -->"


def padded(ids):
    """Return the first LENGTH ids, filled up with <|endoftext|>, and how many of them are real."""
    ids = ids[:LENGTH]
    return torch.tensor(ids + [gpt2_tokenizer().eot_token] * (LENGTH - len(ids))), len(ids)


def spam_data(seed):
    """Return balanced (train, test) lists of (ids, last real position, label) from the SMS messages, without repeats."""
    tokenizer = gpt2_tokenizer()
    messages = pd.read_csv(fetch("sms-spam.csv")).drop_duplicates("text")
    spam = messages[messages.spam == 1]
    ham = messages[messages.spam == 0].sample(len(spam), random_state=seed)
    rows = pd.concat([spam, ham]).sample(frac=1, random_state=seed)
    items = []
    for text, label in zip(rows.text, rows.spam, strict=True):
        ids, n = padded(tokenizer.encode_ordinary(text))
        items.append((ids, torch.tensor(n - 1), torch.tensor(label)))
    cut = int(0.8 * len(items))
    return items[:cut], items[cut:]


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
        ids = [*question, *tokenizer.encode_ordinary(tasks[task](sentence)), tokenizer.eot_token]
        window, n = padded(ids)
        targets = window.clone()
        targets[: len(question)] = IGNORED
        targets[n:] = IGNORED
        if n > len(question):
            items.append((window[:-1], targets[1:]))
    return items[:450], items[450:]


class SpamClassifier(torch.nn.Module):
    """A GPT and a linear layer on its last real position: ids (B, T), last (B) → logits (B, 2)."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.head = gpt, torch.nn.Linear(gpt.config.n_embd, 2)

    def forward(self, ids, last):
        return self.head(self.gpt.hidden(ids)[torch.arange(len(ids)), last])


def spam_loss(model, ids, last, labels):
    return F.cross_entropy(model(ids, last), labels, reduction="sum")


def fine_tune(model, items, test, loss_fn, seed):
    """Train for STEPS steps; return the mean loss over test."""
    loader = DataLoader(items, BATCH, sampler=EpochOrder(len(items), True, seed))
    optimizer, dtype = make_optimizer(model, LR), pick_dtype("auto", torch.device("cpu"))
    return train(model, optimizer, loader, DataLoader(test, 32), STEPS, loss_fn=loss_fn, dtype=dtype, eval_every=STEPS)[
        -1
    ]["val_loss"]


def spam_accuracy(gpt, part, seed):
    """Fine-tune all of a GPT, or only its last block and layer norm as chapter 6 does; return the accuracy on the test set."""
    if part == "last block":
        gpt.requires_grad_(False)
        gpt.blocks[-1].requires_grad_(True)
        gpt.ln_f.requires_grad_(True)
    items, test = spam_data(seed)
    model = SpamClassifier(gpt)
    fine_tune(model, items, test, spam_loss, seed)
    with torch.no_grad():
        right = [model(ids, last).argmax(1) == labels for ids, last, labels in DataLoader(test, 64)]
    return torch.cat(right).double().mean().item()


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
        held_out, moby_dick = (math.exp(measure(new_model(start, 0), path)[0]) for path in (HELD_OUT, moby))
        rows = found[start] = {"held-out": [held_out], "moby-dick": [moby_dick]}
        rows |= {"spam, last block": [], "spam, all": [], "instruction": []}
        for seed in range(SEEDS):
            for part in ("last block", "all"):
                rows[f"spam, {part}"].append(spam_accuracy(new_model(start, seed), part, seed))
            items, test = instruction_data(seed)
            rows["instruction"].append(fine_tune(new_model(start, seed), items, test, next_token_loss, seed))
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


def with_table(text, found, language):
    """Return a README's text with the table in its place."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{table(found, language)}\n\n{END}{rest.partition(END)[2]}"


def main():
    keep_freed_memory()
    if not HELD_OUT.exists():
        raise ValueError(f"{HELD_OUT} is missing: run prepare_books.py first")
    found = results()
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for language, name in enumerate(("README.en.md", "README.md")):
        path = HERE / name
        path.write_text(with_table(path.read_text(encoding="utf-8"), found, language), encoding="utf-8")
    print(table(found, 0))


if __name__ == "__main__":
    run(main)
