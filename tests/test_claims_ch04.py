"""What chapter 4 claims, with other seeds, lengths and depths than its notebook's."""

import math
from dataclasses import replace

from llm_shared.gpt import GELU, FeedForward, GPTConfig, GPTModel, LayerNorm
from llm_shared.linear import Linear
import pytest
import torch
import torch.nn.functional as F
from torch import nn

SEEDS = pytest.mark.parametrize("seed", [404, 1945])
CONFIG = GPTConfig(vocab_size=211, context_length=64, n_embd=48, n_head=4, n_layer=3)


def shaken(seed):
    """A model whose weights are far from zero, so that every position matters."""
    torch.manual_seed(seed)
    model = GPTModel(CONFIG).eval().double()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model


@SEEDS
@pytest.mark.parametrize("depth", [14, 26])
@pytest.mark.parametrize(("spread", "explodes"), [(0.5, True), (0.05, False)])
@torch.no_grad()
def test_without_layer_norm_a_deep_stack_explodes_or_vanishes(seed, depth, spread, explodes):
    torch.manual_seed(seed)
    layers = [Linear(64, 64, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=spread)

    def stds(norm):
        x, found = torch.randn(32, 64), []
        for layer in layers:
            x = GELU()(layer(norm(x)))
            found.append(x.std().item())
        return found

    bare, normed = stds(nn.Identity()), stds(LayerNorm(64))
    assert bare[-1] > 1e3 * bare[0] if explodes else bare[-1] < 1e-3 * bare[0]
    assert max(normed) < 2 * min(normed)


@SEEDS
@pytest.mark.parametrize("depth", [7, 11])
def test_shortcuts_keep_the_first_layers_gradient_alive(seed, depth):
    def first_gradient(shortcut):
        torch.manual_seed(seed)
        layers = [FeedForward(CONFIG) for _ in range(depth)]
        x = torch.randn(8, CONFIG.n_embd)
        for layer in layers:
            x = shortcut * x + layer(x)
        x.square().mean().backward()
        return layers[0].up.weight.grad.abs().mean().item()

    assert first_gradient(1) >= 10 * first_gradient(0) > 0


@SEEDS
@pytest.mark.parametrize(("shallow", "deep"), [(3, 15), (5, 30)])
@torch.no_grad()
def test_narrower_residual_weights_hold_the_stream_when_the_model_deepens(seed, shallow, deep):
    def stream_std(n_layer, narrower):
        torch.manual_seed(seed)
        model = GPTModel(replace(CONFIG, n_embd=96, n_layer=n_layer))
        for name, weight in model.named_parameters():
            if not narrower and name.endswith(("out_proj.weight", "down.weight")):
                weight *= (2 * n_layer) ** 0.5  # back to the 0.02 of the other weights
        seen = []
        model.ln_f.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].std().item()))
        model(torch.randint(CONFIG.vocab_size, (2, 40)))
        return seen[0]

    assert stream_std(deep, narrower=True) == pytest.approx(stream_std(shallow, narrower=True), rel=0.15)
    assert stream_std(deep, narrower=False) > 1.5 * stream_std(shallow, narrower=False)


@SEEDS
@pytest.mark.parametrize(("prompt", "new"), [(5, 12), (17, 31)])
@torch.no_grad()
def test_the_cache_gives_the_same_tokens_for_fewer_positions(seed, prompt, new):
    model = shaken(seed)
    start = torch.randint(CONFIG.vocab_size, (1, prompt))
    computed = []
    model.blocks[0].register_forward_hook(lambda _, inputs, output: computed.append(output.shape[1]))

    def greedy(caches):
        computed.clear()
        ids, fresh = start, start
        for _ in range(new):
            logits = model(fresh if caches else ids, caches)
            fresh = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fresh], dim=1)
        return ids, sum(computed)

    plain, all_positions = greedy(None)
    cached, few_positions = greedy(model.make_caches(1, prompt + new))
    assert torch.equal(plain, cached)
    assert len(plain[0, prompt:].unique()) > 1
    assert all_positions == sum(range(prompt, prompt + new))
    assert few_positions == prompt + new - 1


@SEEDS
@pytest.mark.parametrize(("length", "padding"), [(6, 3), (19, 23)])
@torch.no_grad()
def test_padding_needs_its_mask(seed, length, padding):
    model = shaken(seed)
    row = torch.randint(CONFIG.vocab_size, (1, length))
    padded, alone = F.pad(row, (padding, 0), value=1), model(row)
    real = torch.arange(padding + length)[None] >= padding
    assert (model(padded)[:, padding:] - alone).abs().max() > 0.1
    assert torch.allclose(model(padded, real=real)[:, padding:], alone, atol=1e-10)


@SEEDS
@pytest.mark.parametrize("length", [9, 57])
@pytest.mark.parametrize("vocab_size", [300, 8000])
@torch.no_grad()
def test_the_first_loss_is_that_of_guessing(seed, length, vocab_size):
    torch.manual_seed(seed)
    model = GPTModel(replace(CONFIG, vocab_size=vocab_size))
    ids, targets = torch.randint(vocab_size, (2, 4, length))
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.03)


@SEEDS
@pytest.mark.parametrize("length", [9, 57])
def test_tying_saves_one_embedding_and_both_ends_teach_it(seed, length):
    torch.manual_seed(seed)
    model = GPTModel(CONFIG)
    assert sum(weight.shape == model.tok_emb.weight.shape for weight in model.parameters()) == 1
    ids = torch.randint(CONFIG.vocab_size // 2, (1, length))  # the upper half of the vocabulary is never read
    model(ids).logsumexp(-1).sum().backward()
    assert (model.tok_emb.weight.grad[CONFIG.vocab_size // 2 :].abs().sum(-1) > 0).all()
