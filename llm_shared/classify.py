"""ch06 · A classifier out of a language model: messages, padded batches, a head on the last real token, scores."""

import csv
import json
import zipfile
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from llm_shared.checkpoint import build_model, own_weights, read_safetensors
from llm_shared.data import EpochOrder
from llm_shared.gpt import GPTConfig
from llm_shared.loss import autocast
from llm_shared.resources import fetch, write_safetensors
from llm_shared.training import make_optimizer, train

# The longest real message has 910 characters; a longer row is many messages glued together by a lost quotation mark.
LONGEST = 1000


def read_messages(source="bundled"):
    """Return a DataFrame of distinct messages, columns text and label (1: spam, 0: not).

    source: "bundled", "uci" (the whole SMS Spam Collection, downloaded once), or a CSV file with these two columns. A
    file that is empty, no table, without these columns, or with one label only, is a ValueError.
    """
    import pandas as pd

    try:
        if source == "uci":  # no head line, tabs, and quotation marks that belong to the text
            with (
                zipfile.ZipFile(fetch("sms-spam-collection.zip")) as archive,
                archive.open("SMSSpamCollection") as file,
            ):
                table = pd.read_csv(file, sep="\t", quoting=csv.QUOTE_NONE, names=["label", "text"])
            table["label"] = table.label.map({"spam": 1, "ham": 0})
        else:
            table = pd.read_csv(fetch("sms-spam.csv") if source == "bundled" else source)
            table = table.rename(columns={"spam": "label"}) if source == "bundled" else table
        table = table[["text", "label"]].dropna().drop_duplicates("text")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not a CSV file in UTF-8 with the columns text and label: {error}") from None
    if set(table.label) != {0, 1}:
        raise ValueError(f"{source}: labels must be 0 and 1, and both occur; there are {sorted(set(table.label))}")
    table = table[table.text.str.len() <= LONGEST]
    return table.astype({"label": int}).reset_index(drop=True)


def balance(table, seed=0):
    """Return as many rows of each label as the rarer one has, in random order."""
    n = table.label.value_counts().min()
    return table.groupby("label").sample(n, random_state=seed).sample(frac=1, random_state=seed)


def split(table, seed=0, train=0.7, val=0.1):
    """Return (train, validation, test): random parts of a table; the test set is what the two shares leave."""
    table = table.sample(frac=1, random_state=seed)
    first, second = round(train * len(table)), round((train + val) * len(table))
    return table[:first], table[first:second], table[second:]


def encode_messages(table, tokenizer, max_length):
    """Return a list of (ids, label); of a longer message the first max_length ids. An empty text becomes one <|endoftext|>."""
    encoded = [tokenizer.encode_ordinary(text)[:max_length] or [tokenizer.eot_token] for text in table.text]
    return list(zip(encoded, table.label.tolist(), strict=True))


def pad_batch(items, pad_id=50256, width=None):
    """Return (ids (B, T), lengths (B), labels (B)) of B items; shorter rows are filled up on the right with pad_id."""
    width = width or max(len(ids) for ids, _ in items)
    rows = [ids + [pad_id] * (width - len(ids)) for ids, _ in items]
    return torch.tensor(rows), torch.tensor([len(ids) for ids, _ in items]), torch.tensor([label for _, label in items])


def create_message_loader(items, batch_size, shuffle=True, seed=0, pad_id=50256):
    """Return a DataLoader of padded batches, each as wide as its longest message."""
    order, collate = EpochOrder(len(items), shuffle, seed), partial(pad_batch, pad_id=pad_id)
    return DataLoader(items, batch_size, sampler=order, collate_fn=collate, generator=torch.Generator())


class GPTClassifier(nn.Module):
    """A GPT whose last real position goes through a new head: ids (B, T), lengths (B) → logits (B, n_classes).

    The causal mask hides what stands to the right of a token, so padding cannot change the answer.
    """

    def __init__(self, gpt, n_classes=2):
        super().__init__()
        self.gpt = gpt
        self.head = nn.Linear(gpt.config.n_embd, n_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, lengths):
        hidden = self.gpt.hidden(ids)  # (B, T, n_embd)
        return self.head(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])


def train_only(model, layers):
    """Freeze all parameters but those whose names start with one of layers, such as "gpt.blocks.3"; "all" is all.

    A name that fits nothing is a ValueError.
    """
    for layer in layers:
        if layer != "all" and not any(f"{name}.".startswith(f"{layer}.") for name, _ in model.named_parameters()):
            tops = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))
            raise ValueError(f"no layer is called {layer!r}; there are all, {tops}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(layer == "all" or f"{name}.".startswith(f"{layer}.") for layer in layers))


def classification_loss(model, ids, lengths, labels):
    """Return the summed cross-entropy (nats) of a batch; labels (B)."""
    return F.cross_entropy(model(ids, lengths), labels, reduction="sum")


@torch.no_grad()
def predict(model, loader, dtype=torch.float32):
    """Return (probabilities (N, n_classes), labels (N)) over a loader."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    probs, labels = [], []
    with autocast(device, dtype):
        for ids, lengths, targets in loader:
            probs.append(model(ids.to(device), lengths.to(device)).float().softmax(-1).cpu())
            labels.append(targets)
    model.train(was_training)
    return torch.cat(probs), torch.cat(labels)


def scores(probs, labels):
    """Return accuracy, the confusion matrix [true][predicted], and precision and recall of label 1, nan where undefined."""
    predicted, n = probs.argmax(-1), probs.shape[1]
    confusion = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n)
    hits, said, true = confusion[1, 1], confusion[:, 1].sum(), confusion[1].sum()
    accuracy = (predicted == labels).double().mean().item()
    return {
        "accuracy": accuracy,
        "confusion": confusion.tolist(),
        "precision": (hits / said).item(),
        "recall": (hits / true).item(),
    }


def finetune_classifier(
    model, tokenizer, table, *, layers=("all",), max_length=128, batch_size=16, epochs=5, lr=5e-4, schedule=None, seed=0,
    dtype=torch.float32,
):  # fmt: skip
    """Split a table, train the named layers of a GPTClassifier on its larger part; return (history, scores on the test part).

    schedule(lr, steps) makes the step → learning rate that `train` asks for; without one lr stays.
    """
    items = [encode_messages(part, tokenizer, max_length) for part in split(table, seed)]
    if not all(items):
        raise ValueError(f"{len(table)} messages are too few to train, validate and test on")
    loader, val_loader, test_loader = (
        create_message_loader(part, batch_size, i == 0, seed, tokenizer.eot_token) for i, part in enumerate(items)
    )
    train_only(model, layers)
    steps = epochs * len(loader)
    history = train(
        model, make_optimizer(model, lr), loader, val_loader, steps, loss_fn=classification_loss,
        schedule=schedule and schedule(lr, steps), dtype=dtype, eval_every=len(loader),
    )  # fmt: skip
    return history, scores(*predict(model, test_loader, dtype))


def classify(model, tokenizer, text):
    """Return the probability of each class for one text; one that does not fit the context is a ValueError."""
    ids, context = tokenizer.encode_ordinary(text), model.gpt.config.context_length
    if not 0 < len(ids) <= context:
        raise ValueError(f"the message has {len(ids)} tokens; from 1 to {context} can be read: shorten it")
    return predict(model, [pad_batch([(ids, 0)])])[0][0].tolist()


def save_classifier(path, model):
    """Write a GPTClassifier to one safetensors file, its configuration in the head; one that wears LoRA is a ValueError."""
    gpt, head = own_weights(model.gpt), model.head.state_dict()
    if set(head) != {"weight", "bias"}:
        raise ValueError(f"the head must be one linear layer, unwrapped; this one has {', '.join(head)}")
    config = asdict(model.gpt.config) | {"n_classes": len(head["bias"])}
    weights = {f"gpt.{name}": weight for name, weight in gpt.items()} | {f"head.{name}": head[name] for name in head}
    write_safetensors(path, weights, {"config": json.dumps(config)})


def load_classifier(path, device="cpu"):
    """Return the GPTClassifier that `save_classifier` wrote; a file that is damaged or holds something else is a ValueError."""
    weights = read_safetensors(path, device)
    try:
        config = json.loads((safe_open(path, "pt").metadata() or {})["config"])
        head = {name: weights.pop(f"head.{name}") for name in ("weight", "bias")}
        n_classes = config.pop("n_classes")
        gpt = build_model(GPTConfig(**config), {name.removeprefix("gpt."): w for name, w in weights.items()}, path)
        model = GPTClassifier(gpt, n_classes).to(device)
        model.head.load_state_dict(head)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no classifier of this project: {error}") from None
    return model
