"""What appendix E claims, with other seeds, texts and sizes than its notebook's."""

import json
import math
from functools import cache

from llm_shared.classify import (
    GPTClassifier,
    balance,
    classification_loss,
    create_message_loader,
    encode_messages,
    read_messages,
    train_only,
)
from llm_shared.gpt import CONFIGS, GPTConfig, GPTModel
from llm_shared.lora import LoRALinear, adapter, add_lora, merge_lora
from llm_shared.loss import next_token_loss
from llm_shared.tokenizer import gpt2_tokenizer
from llm_shared.training import endless, make_optimizer
from llm_shared.weights import load_pretrained
import pytest
import torch
from samples import ROOT
from torch import nn

SEEDS = pytest.mark.parametrize("seed", [404, 1945])
LAYERS = ["attn.qkv", "attn.out_proj", "ffn.up", "ffn.down"]


@cache
def drafts():
    """The five drafts of LoRALinear, and what puts them into a GPT, as the notebook defines them."""
    path = ROOT / "appendix-E/01_main-chapter-code/appendix-E.ipynb"
    names = {"torch": torch, "nn": nn, "math": math}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "class LoRALinearV" in source:
            for part in source.split("\n\n\n"):
                if part.startswith(("class ", "def put_in")):
                    exec(part, names)
    return names


@cache
def messages(seed):
    return encode_messages(balance(read_messages(), seed), gpt2_tokenizer(), 32)


def classifier(seed):
    torch.manual_seed(seed)
    return GPTClassifier(load_pretrained("mini"))


def text_loss(gpt):
    ids = torch.tensor([gpt2_tokenizer().encode_ordinary("She was obliged to leave the room, and to hear no more.")])
    return next_token_loss(gpt, ids[:, :-1], ids[:, 1:]) / (ids.shape[1] - 1)


def share(matrix, k):
    """The part of the sum of squares that the first k directions carry."""
    squares = torch.linalg.svdvals(matrix).square()
    return (squares[:k].sum() / squares.sum()).item()


@pytest.mark.parametrize("n", [9, 12, 30])
def test_tables_have_few_directions(n):
    torch.manual_seed(n)
    numbers = torch.arange(1.0, n + 1)
    ranks = [
        torch.linalg.matrix_rank(x) for x in (numbers.outer(numbers), numbers[:, None] + numbers, torch.randn(n, n))
    ]
    assert ranks == [1, 2, n]


@SEEDS
def test_fine_tuning_moves_along_few_directions(seed):
    model, before = classifier(seed), dict(classifier(seed).named_parameters())
    optimizer = make_optimizer(model, 5e-4)
    for _, batch in zip(range(10), endless(create_message_loader(messages(seed)[:160], 16, seed=seed)), strict=False):
        (classification_loss(model, *batch) / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        changes = [w - before[name] for name, w in model.named_parameters() if ".blocks." in name and w.ndim == 2]
    assert len(changes) == 16 and min(share(change, 8) for change in changes) > 0.4
    assert max(share(torch.randn_like(change), 8) for change in changes) < 0.15


@SEEDS
def test_a_model_that_starts_random_is_worse_than_guessing(seed):
    torch.manual_seed(seed)
    make = drafts()["LoRALinearV1"]
    gpt = load_pretrained("mini")
    fine = text_loss(gpt).item()
    assert fine < 6 < 10.8 < text_loss(drafts()["put_in"](gpt, lambda linear: make(linear, 4))).item()


@SEEDS
def test_two_zeros_never_learn_and_one_does(seed):
    def losses(make):
        torch.manual_seed(seed)
        gpt = drafts()["put_in"](load_pretrained("mini"), make)
        optimizer, found, silent = make_optimizer(gpt, 3e-3), [], []
        for _ in range(5):
            text_loss(gpt).backward()
            found.append(text_loss(gpt).item())
            qkv = gpt.blocks[2].attn.qkv
            silent.append([not qkv.A.grad.any().item(), not qkv.B.grad.any().item()])
            optimizer.step()
            optimizer.zero_grad()
        return found, silent

    still, silent = losses(lambda linear: drafts()["LoRALinearV2"](linear, 4))
    assert len(set(still)) == 1 and all(map(all, silent))
    learning, silent = losses(lambda linear: LoRALinear(linear, 4, 4))
    assert learning[0] == still[0] and learning[-1] < still[0] - 0.2
    assert silent[0] == [True, False] and silent[1] == [False, False]


@SEEDS
def test_without_the_division_the_rank_is_a_learning_rate(seed):
    batch = next(iter(create_message_loader(messages(seed)[:16], 16)))

    def drop(make):
        model = classifier(seed).requires_grad_(False)
        drafts()["put_in"](model.gpt, make)
        before = classification_loss(model, *batch)
        before.backward()
        make_optimizer(model, 1e-4).step()
        return (before - classification_loss(model, *batch)).item()

    plain = [drop(lambda linear, r=r: drafts()["LoRALinearV3"](linear, r)) for r in (4, 32)]
    scaled = [drop(lambda linear, r=r: LoRALinear(linear, r, 8)) for r in (4, 32)]
    assert 4.5 < plain[1] / plain[0] < 12 and 0.6 < scaled[1] / scaled[0] < 1.6


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 30), (40, 8)])
def test_a_merge_without_memory_counts_twice(d_in, d_out):
    torch.manual_seed(d_in)
    x, results = torch.randn(5, d_in), []
    for make in (drafts()["LoRALinearV5"], LoRALinear):
        linear = nn.Linear(d_in, d_out)
        layer = make(linear, 4, 2)
        nn.init.normal_(layer.B)
        with torch.no_grad():
            frozen, apart = linear(x), layer(x)
            layer.merge()
            results.append(((layer(x) - frozen).norm() / (apart - frozen).norm()).item())
    assert results == [pytest.approx(2, abs=1e-3), pytest.approx(1, abs=1e-3)]


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_parameters_and_optimizer_memory(rank):
    model = add_lora(classifier(0), LAYERS, rank, 8)
    model.head.requires_grad_(True)
    trained = sum(weight.numel() for weight in adapter(model).values())
    assert trained == 4 * rank * 16 * 256 + 2 * 256 + 2  # (768 + 256) + (256 + 256) + 2 * (1024 + 256) = 16 * 256
    optimizer = make_optimizer(model, 1e-4)
    (classification_loss(model, *next(iter(create_message_loader(messages(404)[:2], 2))))).backward()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    assert sum(tensor.numel() * tensor.element_size() for tensor in states) == 8 * trained


def test_the_first_exercise_counts_gpt2():
    with torch.device("meta"):
        model = add_lora(GPTModel(CONFIGS["gpt2-small (124M)"]), LAYERS, 16, 16)
    assert sum(weight.numel() for weight in adapter(model).values()) == 2_359_296


@SEEDS
def test_the_first_step_of_lora_is_ten_times_shorter(seed):
    batch, moved = next(iter(create_message_loader(messages(seed)[:8], 8))), []
    for prepare in (lambda model: train_only(model, ["all"]), lambda model: add_lora(model, LAYERS, 8, 8)):
        model = classifier(seed)
        before = model.gpt.blocks[1].ffn.up.weight.detach().clone()
        prepare(model)
        classification_loss(model, *batch).backward()
        make_optimizer(model, 1e-3, weight_decay=0.0).step()
        merge_lora(model)
        up = model.gpt.blocks[1].ffn.up
        weight = up.linear.weight if isinstance(up, LoRALinear) else up.weight
        moved.append((weight - before).abs().mean().item() / 1e-3)
    assert 0.8 < moved[0] < 1.05 and 5 < moved[0] / moved[1] < 25


@SEEDS
def test_switched_off_the_model_is_the_old_one_bit_for_bit(seed):
    torch.manual_seed(seed)
    gpt = GPTModel(GPTConfig(vocab_size=97, context_length=16, n_embd=24, n_head=3, n_layer=2))
    ids = torch.randint(97, (3, 16))
    before = gpt(ids)
    add_lora(gpt, LAYERS, 4, 8)
    optimizer = make_optimizer(gpt, 1e-2)
    for _ in range(3):
        gpt(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(gpt(ids), before)
    for module in gpt.modules():
        if isinstance(module, LoRALinear):
            module.scale = 0
    assert torch.equal(gpt(ids), before)
