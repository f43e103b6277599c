"""What chapter 3 claims from one seed and one sentence, with other seeds and other lengths."""

from llm_shared.attention import KVCache, MultiHeadAttention, causal_mask
import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(params=[2027, 90210], ids="seed{}".format)
def seed(request):
    torch.manual_seed(request.param)
    return request.param


lengths = pytest.mark.parametrize("T", [5, 23])


def by_hand(q, k, v):
    """Causal attention as the chapter first writes it, and its weights."""
    scores = q @ k.mT / k.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal_mask(q.shape[-2], k.shape[-2]), -torch.inf).softmax(-1)
    return weights @ v, weights


@lengths
def test_without_scaling_the_softmax_stops_learning_as_d_grows(seed, T):
    def gradient(d, scale):
        scores = (torch.randn(300, 1, d) @ torch.randn(300, d, T) / scale).requires_grad_()
        scores.softmax(-1).max(-1).values.sum().backward()
        return scores.grad.abs().mean().item()

    raw = [gradient(d, 1) for d in (4, 64, 1024)]
    scaled = [gradient(d, d**0.5) for d in (4, 64, 1024)]
    assert raw[0] > 1.5 * raw[1] > 3 * raw[2]
    assert max(scaled) < 1.25 * min(scaled)
    assert scaled[2] > 4 * raw[2]


@lengths
def test_masking_after_the_softmax_leaves_rows_that_do_not_sum_to_one(seed, T):
    scores, mask = torch.randn(T, T), causal_mask(T, T)
    late = scores.softmax(-1) * mask
    early = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    assert (late.sum(-1)[:-1] < 0.999).all() and late.sum(-1)[-1] > 0.999
    assert torch.allclose(early.sum(-1), torch.ones(T))
    assert torch.allclose(late / late.sum(-1, keepdim=True), early, atol=1e-6)


@lengths
def test_only_the_mask_keeps_the_future_from_the_past(seed, T):
    attention, x = MultiHeadAttention(8, 12, 3), torch.randn(1, T, 8)
    changed = x.clone()
    changed[:, -1] = torch.randn(8)
    everything = torch.ones(T, T, dtype=torch.bool)
    assert torch.allclose(attention(x)[:, :-1], attention(changed)[:, :-1], atol=1e-6)
    moved = (attention(x, mask=everything) - attention(changed, mask=everything)).abs().amax(-1)
    assert (moved > 1e-4).all()


@lengths
def test_one_matrix_equals_the_heads_side_by_side(seed, T):
    attention, x = MultiHeadAttention(10, 12, 3), torch.randn(2, T, 10)
    rows = attention.qkv.weight.view(3, 3, 4, 10)  # query, key, value; head; head_dim; d_in
    heads = [by_hand(*(x @ part.T for part in rows[:, h]))[0] for h in range(3)]
    assert torch.allclose(attention.out_proj(torch.cat(heads, -1)), attention(x), atol=1e-5)


@lengths
def test_the_fused_attention_equals_the_one_by_hand(seed, T):
    q, k, v = (torch.randn(2, 3, T, 16, requires_grad=True) for _ in range(3))
    fused, (ours, weights) = F.scaled_dot_product_attention(q, k, v, is_causal=True), by_hand(q, k, v)
    assert torch.allclose(fused, ours, atol=1e-5)
    assert (weights.triu(1) == 0).all()
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (fused, ours)), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@lengths
@torch.no_grad()
def test_the_cache_gives_the_rows_of_the_full_pass(seed, T):
    attention, x = MultiHeadAttention(8, 12, 3).eval(), torch.randn(2, T, 8)
    for first in (1, T // 2):
        cache = KVCache(2, 3, T, 4)
        parts = [attention(part, cache) for part in x.split([first, 2] + [1] * (T - first - 2), dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), attention(x), atol=1e-5)


@lengths
def test_a_causal_triangle_at_the_wrong_corner_runs_and_is_wrong(seed, T):
    q, k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 3, T, 4), torch.randn(1, 3, T, 4)
    right = F.scaled_dot_product_attention(q, k, v, causal_mask(2, T))
    wrong = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(right, by_hand(q, k, v)[0], atol=1e-5)
    assert wrong.shape == right.shape and (wrong - right).abs().max() > 0.1


@lengths
def test_dropout_keeps_the_mean_and_only_trains(seed, T):
    attention, x = MultiHeadAttention(8, 12, 3, dropout=0.5), torch.randn(1, T, 8)
    plain = MultiHeadAttention(8, 12, 3)
    plain.load_state_dict(attention.state_dict())
    with torch.no_grad():
        mean = attention(x.expand(3_000, -1, -1)).mean(0)
        assert not torch.equal(attention(x), attention(x))
        assert torch.allclose(mean, plain(x)[0], atol=0.06)
        assert torch.equal(attention.eval()(x), plain(x))
