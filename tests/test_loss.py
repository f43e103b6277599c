import tracemalloc

import llm_shared.loss
from llm_shared.data import create_dataloader
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.loss import (
    IGNORED,
    HeadCrossEntropy,
    autocast,
    bits_per_byte,
    evaluate,
    next_token_loss,
    unigram_entropy,
)
import numpy as np
import pytest
import torch
import torch.nn.functional as F

CONFIG = GPTConfig(vocab_size=50, context_length=8, n_embd=16, n_head=2, n_layer=1, dropout=0.1)


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("ignored", [0, 5, 20])
def test_equals_cross_entropy_with_gradients(monkeypatch, chunk, ignored):
    monkeypatch.setattr(llm_shared.loss, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(20, 12, dtype=torch.double, requires_grad=True)
    weight = torch.randn(30, 12, dtype=torch.double, requires_grad=True)
    targets = torch.randint(30, (20,))
    targets[:ignored] = IGNORED
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    expected_grads = torch.autograd.grad(expected * 3, [hidden, weight])
    ours = HeadCrossEntropy.apply(hidden, weight, targets)
    grads = torch.autograd.grad(ours * 3, [hidden, weight])
    assert torch.allclose(ours.double(), expected, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [0, 1, 50, 87.5, 103, 104, 200, 1e4, 6e4])
def test_hopeless_targets_cost_what_they_cost(gap, dtype):
    """The target is behind by a gap that no number type holds as a probability."""
    for target in (torch.tensor([0]), torch.tensor([1])):
        hidden = torch.tensor([[gap]], dtype=dtype)
        weight = torch.tensor([[0.0], [1.0]], dtype=dtype, requires_grad=True)
        loss = HeadCrossEntropy.apply(hidden, weight, target)
        want = F.cross_entropy(hidden.double() @ weight.double().T, target)
        close = {"rel": 5e-3, "abs": 5e-3 if dtype.itemsize == 2 else 1e-4}
        assert loss.item() == pytest.approx(want.item(), **close)
        (ours,), (theirs,) = torch.autograd.grad(loss, weight), torch.autograd.grad(want, weight)
        assert ours.flatten().tolist() == pytest.approx(theirs.flatten().tolist(), **close)


def test_one_likeliest_token_among_many_lost_ones():
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 8) * 40, torch.randn(200, 8)
    targets = torch.randint(200, (30,))
    targets[3] = IGNORED
    want = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    assert want > 30 * 104  # hardly any probability is above float32's smallest
    assert torch.allclose(HeadCrossEntropy.apply(hidden, weight, targets), want, rtol=1e-6)


def test_a_lost_number_stays_visible():
    loss = HeadCrossEntropy.apply(torch.tensor([[torch.nan]]), torch.ones(3, 1), torch.tensor([0]))
    assert loss.isnan()


def test_mixed_precision_is_close():
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    ids, targets = torch.randint(50, (2, 4, 8))
    exact = next_token_loss(model, ids, targets)
    with autocast(torch.device("cpu"), torch.bfloat16):
        close = next_token_loss(model, ids, targets)
    assert close.item() == pytest.approx(exact.item(), rel=2e-3)
    close.backward()
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


def test_no_logits_of_the_whole_batch_exist():
    weight = torch.randn(1000, 4, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        HeadCrossEntropy.apply(torch.randn(2048, 4), weight, torch.randint(1000, (2048,)))
    assert largest == llm_shared.loss.CHUNK * 1000


def test_evaluation_weighs_every_token_the_same():
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    tokens = np.random.default_rng(0).integers(50, size=11 * 8 + 1).astype(np.uint16)  # 11 windows: 4 + 4 + 3
    loader = create_dataloader(tokens, 4, 8, 8, shuffle=False)
    model.eval()
    inputs, targets = (torch.from_numpy(part.astype(np.int64)).view(11, 8) for part in (tokens[:-1], tokens[1:]))
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    model.train()
    assert evaluate(model, loader) == pytest.approx(expected, rel=1e-6)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    first = F.cross_entropy(model.eval()(inputs[:4]).flatten(0, 1), targets[:4].flatten()).item()
    assert evaluate(model, loader, batches=1) == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("n", [1, 7, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_counting_tokens_takes_constant_memory(n):
    tokens = (np.arange(n) % 300 * 7 % 50).astype(np.uint16)
    counts = np.bincount(tokens)
    probs = counts[counts > 0] / n
    tracemalloc.start()
    entropy = unigram_entropy(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entropy == pytest.approx(-(probs * np.log(probs)).sum(), abs=1e-12)
    assert peak < 10_000_000


def test_what_to_compare_with():
    assert unigram_entropy(np.array([3, 5, 3, 5])) == pytest.approx(np.log(2))
    assert unigram_entropy(np.array([7, 7])) == 0
    assert bits_per_byte(np.log(2), n_tokens=10, n_bytes=40) == pytest.approx(0.25)
