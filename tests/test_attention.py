from llm_shared.attention import KVCache, MultiHeadAttention, causal_mask
import pytest
import torch


def naive_attention(attention, x):
    """The definition, position by position and head by head."""
    B, T, _ = x.shape
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    head_dim = q.shape[-1] // attention.n_head
    context = torch.zeros_like(q)
    for b in range(B):
        for h in range(attention.n_head):
            part = slice(h * head_dim, (h + 1) * head_dim)
            for t in range(T):
                scores = torch.stack([q[b, t, part] @ k[b, s, part] for s in range(t + 1)]) / head_dim**0.5
                context[b, t, part] = scores.softmax(0) @ v[b, : t + 1, part]
    return attention.out_proj(context)


@pytest.mark.parametrize(("d_in", "d_out", "n_head"), [(8, 8, 2), (5, 12, 3), (9, 4, 1), (3, 6, 6)])
def test_equals_the_definition(d_in, d_out, n_head):
    torch.manual_seed(0)
    attention = MultiHeadAttention(d_in, d_out, n_head, qkv_bias=True).double()
    x = torch.randn(2, 6, d_in, dtype=torch.double, requires_grad=True)
    ours = attention(x)
    assert torch.allclose(ours, naive_attention(attention, x), atol=1e-12)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    (naive_grad,) = torch.autograd.grad(naive_attention(attention, x).sum(), x)
    assert torch.allclose(grad, naive_grad, atol=1e-12)


def test_the_future_is_hidden():
    attention = MultiHeadAttention(8, 8, 2)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.allclose(attention(x)[:, :4], attention(changed)[:, :4], atol=1e-6)


def test_given_mask():
    attention = MultiHeadAttention(8, 8, 2)
    x = torch.randn(1, 6, 8)
    assert torch.allclose(attention(x, mask=causal_mask(6, 6)), attention(x), atol=1e-6)
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert not torch.allclose(attention(x, mask=everything)[:, 0], attention(x)[:, 0], atol=1e-4)


def test_cache():
    attention = MultiHeadAttention(8, 12, 3).double()
    x = torch.randn(2, 7, 8, dtype=torch.double)
    cache = KVCache(2, 3, 7, 4, dtype=torch.double)
    memory = cache.keys.data_ptr()
    parts = [attention(part, cache) for part in x.split([3, 1, 2, 1], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), attention(x), atol=1e-12)
    assert cache.keys.data_ptr() == memory and cache.length == 7
    with pytest.raises(ValueError, match="holds 7 tokens, 8 were given"):
        attention(x[:, :1], cache)


def test_gpt2_sized_attention_has_the_books_number_of_weights():
    assert sum(weight.numel() for weight in MultiHeadAttention(768, 768, 12).parameters()) == 2_360_064


def test_heads_must_divide():
    with pytest.raises(ValueError, match="d_out=10 is not divisible by n_head=3"):
        MultiHeadAttention(10, 10, 3)
