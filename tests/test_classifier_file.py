"""The classifier's file: what cannot be read back is not written, and what is damaged is refused by one line."""

import json
from dataclasses import asdict

from llm_shared.classify import GPTClassifier, load_classifier, save_classifier
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.lora import add_lora, unwrap_lora
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

CONFIG = GPTConfig(vocab_size=97, context_length=16, n_embd=24, n_head=3, n_layer=2)
INPUTS = torch.arange(32).view(2, 16), torch.tensor([16, 3])
GOOD = asdict(CONFIG) | {"n_classes": 3}


def classifier():
    torch.manual_seed(0)
    return GPTClassifier(GPTModel(CONFIG), 3)


def with_head(head):
    model = classifier()
    model.head = head
    return model


def around(model):
    """A classifier around a compiled GPT."""
    model.gpt = torch.compile(model.gpt, backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: add_lora(classifier(), ["attn.qkv"], 2, 2), "must be unwrapped first: .*attn.qkv.A"),
        (lambda: add_lora(classifier(), ["head"], 2, 2), "the head must be one linear layer, unwrapped; this one has A, B"),
        (lambda: around(classifier()), "must be unwrapped first: .*_orig_mod"),
        (lambda: with_head(nn.Sequential(nn.Linear(24, 3))), "this one has 0.weight, 0.bias"),
        (lambda: with_head(nn.Linear(24, 3, bias=False)), "this one has weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_back_is_not_written(tmp_path, make, message):
    path = tmp_path / "spam.safetensors"
    path.write_text("before")
    with pytest.raises(ValueError, match=message):
        save_classifier(path, make())
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "make",
    [
        classifier,
        lambda: torch.compile(classifier(), backend="eager"),
        lambda: unwrap_lora(add_lora(classifier(), ["attn.qkv", "head"], 2, 2)),
    ],
)
def test_what_can_be_read_back_says_the_same(tmp_path, make):
    save_classifier(tmp_path / "spam.safetensors", make())
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path / "spam.safetensors")(*INPUTS), classifier()(*INPUTS))


@pytest.mark.parametrize(
    "config",
    ["", "{", "null", "[]", "3", '"x"', *(json.dumps(GOOD | change) for change in (
        {"n_classes": 2}, {"n_classes": "3"}, {"n_classes": 10**15}, {"n_classes": -1}, {"n_layer": 10**6}, {"n_layer": 1},
        {"n_head": 5}, {"n_head": "3"}, {"n_embd": 48}, {"colour": 1},
    ))],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, config):
    path = tmp_path / "spam.safetensors"
    save_file(classifier().state_dict(), path, {"config": config})
    with pytest.raises(ValueError, match="spam.safetensors is no classifier of this project: "):
        load_classifier(path)


@pytest.mark.parametrize(
    ("name", "shape"), [("head.bias", (2,)), ("head.weight", (3, 5)), ("gpt.ln_f.bias", (9,)), ("gpt.x", (1,))]
)
def test_weights_of_another_shape_are_refused(tmp_path, name, shape):
    path = tmp_path / "spam.safetensors"
    save_file(classifier().state_dict() | {name: torch.zeros(shape)}, path, {"config": json.dumps(GOOD)})
    with pytest.raises(ValueError, match="spam.safetensors is no classifier of this project: "):
        load_classifier(path)
