"""ch06 · A classifier out of a language model: messages, padded batches, a head on the last real token, scores."""

import csv
import json
import zipfile
from dataclasses import asdict
from functools import partial

from llm_shared.checkpoint import build_model, own_weights, read_safetensors
from llm_shared.data import EpochOrder
from llm_shared.gpt import GPTConfig
from llm_shared.loss import autocast
from llm_shared.resources import fetch, write_safetensors
from llm_shared.training import make_optimizer, train
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

LABELS = {"0": 0, "0.0": 0, "false": 0, "ham": 0, "1": 1, "1.0": 1, "true": 1, "spam": 1}
# The longest real message has 910 characters; a longer row is many messages glued together by a lost quotation mark.
LONGEST = 1000


def read_messages(source="bundled"):
    """Return a DataFrame of distinct messages, text and label (1: spam), of "bundled", "uci" or a CSV file; else ValueError."""
    import pandas as pd

    exact = {"dtype": str, "keep_default_na": False}  # a message may be NA, or 123
    file = source
    if source == "bundled":
        file, exact = fetch("sms-spam.csv"), exact | {"names": ["row", "label", "text"], "header": 0}
    if source == "uci":  # no head line, tabs, and quotation marks that belong to the text
        file = zipfile.Path(fetch("sms-spam-collection.zip"), "SMSSpamCollection").open("rb")
        exact |= {"names": ["label", "text"], "sep": "\t", "quoting": csv.QUOTE_NONE}
    try:
        table = pd.read_csv(file, **exact)
        if not {"text", "label"} <= {*table} or not isinstance(table.index, pd.RangeIndex):
            raise ValueError(f"the head line is {[*table]}, and each row needs as many cells")
    except ValueError as error:  # also those of pandas
        raise ValueError(f"{source} is no CSV in UTF-8 with the columns text and label: {error}".strip()) from None
    kept = table[table.text.str.strip().str.len().between(1, LONGEST)]
    if len(kept) < len(table):
        print(f"{source}: {len(table) - len(kept)} rows left out, empty or longer than {LONGEST} characters")
    labels = kept.label.str.strip().str.lower().map(LABELS)
    wrong = labels.isna() | (labels.groupby(kept.text).transform("nunique") > 1)
    if wrong.any():
        row = wrong.idxmax()
        raise ValueError(f"{source}, row {row + 2}: {table.label[row]!r}; write 0 or 1, for the same text the same")
    if set(labels) != {0, 1}:
        raise ValueError(f"{source}: labels must be 0 and 1, and both occur; there are {sorted(set(labels))}")
    return kept.assign(label=labels)[["text", "label"]].drop_duplicates(ignore_index=True)


def balance(table, seed=0):
    """Return as many rows of each label as the rarer one has, in random order."""
    n = table.label.value_counts().min()
    return table.groupby("label").sample(n, random_state=seed).sample(frac=1, random_state=seed)


def split(table, seed=0, train=0.7, val=0.1):
    """Return (train, validation, test): random parts, alike in labels; a label too rare to be in each is a ValueError."""
    table = table.sample(frac=1, random_state=seed)
    groups = table.groupby("label").label
    place = (groups.cumcount() + 0.5) / groups.transform("size")  # of a row among those of its label: 0 < place < 1
    parts = table[place < train], table[(train <= place) & (place < train + val)], table[train + val <= place]
    for part, share in zip(parts, (train, val, train + val < 1), strict=True):
        if share and part.label.nunique() < max(groups.ngroups, 1):
            raise ValueError(f"too few rows to have each label in each part: {groups.size().to_dict()}")
    return parts


def encode_messages(table, tokenizer, max_length):
    """Return a list of (ids, label); of a longer message the first max_length ids. An empty text becomes one <|endoftext|>."""
    encoded = [tokenizer.encode_ordinary(text)[:max_length] or [tokenizer.eot_token] for text in table.text]
    return list(zip(encoded, table.label.tolist(), strict=True))


def pad_batch(items, pad_id=50256, width=None):
    """Return (ids (B, T), lengths (B), labels (B)) of B items; shorter rows are filled up on the right with pad_id."""
    lengths = [len(ids) for ids, _ in items]
    width = width or max(lengths)
    if not 1 <= min(lengths) <= max(lengths) <= width:
        raise ValueError(f"a batch takes no row without ids and none wider than {width}; these have {lengths}")
    rows = [ids + [pad_id] * (width - len(ids)) for ids, _ in items]
    return torch.tensor(rows), torch.tensor(lengths), torch.tensor([label for _, label in items])


def create_message_loader(items, batch_size, shuffle=True, seed=0, pad_id=50256):
    """Return a DataLoader of padded batches, each as wide as its longest message."""
    order, collate = EpochOrder(len(items), shuffle, seed), partial(pad_batch, pad_id=pad_id)
    return DataLoader(items, batch_size, sampler=order, collate_fn=collate, generator=torch.Generator())


class GPTClassifier(nn.Module):
    """A GPT whose last real position goes through a new head: ids (B, T), lengths (B) → logits (B, n_classes)."""

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
    """Freeze all parameters but those of layers, such as "gpt.blocks.3"; "all" is all, an unknown name a ValueError."""
    modules = {"all": model} | dict(model.named_modules())
    if unknown := [layer for layer in layers if layer not in modules]:
        raise ValueError(f"no layer is called {unknown[0]!r}; there are {', '.join(filter(None, modules))}")
    model.requires_grad_(False)
    for layer in layers:
        modules[layer].requires_grad_(True)


def classification_loss(model, ids, lengths, labels):
    """Return the summed cross-entropy (nats) of a batch; labels (B)."""
    return F.cross_entropy(model(ids, lengths), labels, reduction="sum")


@torch.no_grad()
def predict(model, loader, dtype=torch.float32):
    """Return (probabilities (N, n_classes), labels (N)) over a loader."""
    device, was_training = next(model.parameters()).device, model.training
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
    precision, recall = (hits / said).item(), (hits / true).item()
    return {"accuracy": accuracy, "confusion": confusion.tolist(), "precision": precision, "recall": recall}


def finetune_classifier(
    model, tokenizer, table, *, layers=("all",), max_length=128, batch_size=16, epochs=5, lr=5e-4, schedule=None, seed=0,
    dtype=torch.float32,
):  # fmt: skip
    """Split a table, train the named layers on its larger part with schedule(lr, steps); return (history, test scores)."""
    if epochs < 1 or max_length < 1 or not 0 < lr < float("inf"):
        raise ValueError(f"epochs={epochs} and max_length={max_length} must be at least 1, lr={lr} a number above 0")
    items = [encode_messages(part, tokenizer, max_length) for part in split(table, seed)]
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
    """Return the probability of each class for one text; an empty one, or one over the context, is a ValueError."""
    batch = pad_batch([(tokenizer.encode_ordinary(text), 0)])
    return predict(model, [batch])[0][0].tolist()


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
