from dataclasses import replace

from llm_shared.gpt import CONFIGS, GELU, FeedForward, GPTConfig, GPTModel, LayerNorm, TransformerBlock
from llm_shared.loss import next_token_loss
import pytest
import torch
import torch.nn.functional as F
from parity import copy_from_hf, copy_to_hf, hf_model

ODD_CONFIGS = [
    GPTConfig(vocab_size=11, context_length=7, n_embd=6, n_head=3, n_layer=1),
    GPTConfig(vocab_size=101, context_length=33, n_embd=40, n_head=5, n_layer=3),
    GPTConfig(vocab_size=64, context_length=1, n_embd=8, n_head=1, n_layer=2),
    GPTConfig(vocab_size=257, context_length=19, n_embd=35, n_head=7, n_layer=5),
    GPTConfig(vocab_size=1000, context_length=50, n_embd=96, n_head=2, n_layer=2, qkv_bias=False),
    GPTConfig(vocab_size=50257, context_length=13, n_embd=24, n_head=8, n_layer=1),
]
SMALL = ODD_CONFIGS[1]


@pytest.mark.parametrize("config", ODD_CONFIGS, ids=str)
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_equals_transformers(config, direction):
    torch.manual_seed(0)
    hf, ours = hf_model(config), GPTModel(config)
    if direction == "theirs to ours":
        copy_from_hf(hf, ours)
    else:
        copy_to_hf(ours, hf)
    ids = torch.randint(config.vocab_size, (3, config.context_length))
    labels = torch.randint(config.vocab_size, ids.shape)

    theirs = hf(ids).logits
    assert torch.allclose(ours(ids), theirs, atol=1e-5)

    their_loss = F.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    our_loss = next_token_loss(ours, ids, labels) / labels.numel()
    assert torch.allclose(our_loss, their_loss, atol=1e-5)
    their_loss.backward()
    our_loss.backward()
    copy = GPTModel(config)
    with torch.no_grad():  # from here on each weight is its gradient, so that the same copying compares them
        for weight in (*hf.parameters(), *ours.parameters()):
            weight.copy_(weight.grad)
    copy_from_hf(hf, copy)
    for (name, their), our in zip(copy.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(our, their, atol=1e-5), name


def test_the_four_sizes_of_gpt2():
    counts = {}
    with torch.device("meta"):
        for name, config in CONFIGS.items():
            counts[name] = sum(weight.numel() for weight in GPTModel(config).parameters())
    assert counts["gpt2-small (124M)"] == 124_439_808
    assert counts["gpt2-medium (355M)"] == 354_823_168
    assert counts["gpt2-large (774M)"] == 774_030_080
    assert counts["gpt2-xl (1558M)"] == 1_557_611_200


def test_initial_weights():
    torch.manual_seed(0)
    config = replace(CONFIGS["mini"], vocab_size=1000, n_layer=8)
    for name, weight in GPTModel(config).named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif "ln_" in name:
            assert (weight == 1).all()
        else:
            std = 0.02 / 4 if "out_proj" in name or "down" in name else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name


def test_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    ids, targets = torch.randint(SMALL.vocab_size, (2, 8, SMALL.context_length))
    loss = next_token_loss(GPTModel(SMALL), ids, targets) / ids.numel()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(SMALL.vocab_size)).item(), rel=0.02)


def test_layers_by_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10)
    norm = LayerNorm(10)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    by_hand = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert torch.allclose(norm(x), by_hand * norm.weight + norm.bias, atol=1e-6)
    cube = x + 0.044715 * x**3
    assert torch.allclose(GELU()(x), 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * cube)), atol=1e-6)
    assert FeedForward(GPTConfig(n_embd=10, n_head=1))(x).shape == x.shape
    assert TransformerBlock(GPTConfig(n_embd=10, n_head=1))(x).shape == x.shape


def test_last_only_and_head():
    model = GPTModel(SMALL).eval()
    ids = torch.randint(SMALL.vocab_size, (2, 9))
    logits = model(ids)
    assert torch.allclose(model(ids, last_only=True), logits[:, -1:], atol=1e-6)
    assert torch.equal(model.head(model.hidden(ids)), logits)


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 1, 1, 3], [2, 7]])
def test_cache_changes_nothing(cuts):
    torch.manual_seed(0)
    model = GPTModel(SMALL).eval().double()
    ids = torch.randint(SMALL.vocab_size, (2, 9))
    caches = model.make_caches(2, 9)
    logits = torch.cat([model(part, caches) for part in ids.split(cuts, dim=1)], dim=1)
    assert torch.allclose(logits, model(ids), atol=1e-10)


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_changes_nothing(cached):
    torch.manual_seed(0)
    model = GPTModel(SMALL).eval().double()
    row = torch.randint(SMALL.vocab_size, (1, 6))
    padded = F.pad(row, (4, 0), value=77)
    real = torch.tensor([[False] * 4 + [True] * 6])
    caches = model.make_caches(1, 10) if cached else None
    if cached:
        model(padded[:, :8], caches, real[:, :8])
        logits = model(padded[:, 8:], caches, real)
        assert torch.allclose(logits, model(row)[:, 4:], atol=1e-10)
    else:
        assert torch.allclose(model(padded, real=real)[:, 4:], model(row), atol=1e-10)


def test_dropout_only_while_training():
    model = GPTModel(replace(SMALL, dropout=0.5))
    ids = torch.randint(SMALL.vocab_size, (1, 5))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 7}, "not divisible"),
        ({"n_layer": 0}, "n_layer must be"),
        ({"vocab_size": 2.5}, "vocab_size must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="34 tokens do not fit the context of 33"):
        GPTModel(SMALL)(torch.zeros(1, 34, dtype=torch.long))
