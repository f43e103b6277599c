"""ch03 · Causal multi-head attention and its key-value cache."""

from llm_shared.linear import Linear
import torch
import torch.nn.functional as F
from torch import nn


class KVCache:
    """Keys and values of the tokens seen so far, in memory taken once: two (B, n_head, max_length, head_dim) tensors."""

    def __init__(self, batch_size, n_head, max_length, head_dim, dtype=None, device=None):
        self.keys = torch.zeros(batch_size, n_head, max_length, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, keys, values):
        """Store the new (B, n_head, T, head_dim) keys and values; return views of all stored so far."""
        T, room = keys.shape[2], self.keys.shape[2]
        if self.length + T > room:
            raise ValueError(f"the cache holds {room} tokens, {self.length + T} were given")
        self.keys.narrow(2, self.length, T).copy_(keys)
        self.values.narrow(2, self.length, T).copy_(values)
        self.length += T
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)


def causal_mask(n_query, n_key, device=None):
    """Return the (n_query, n_key) mask that is True where a query may look: at its own position and before.

    The queries are the last n_query of the n_key positions.

    >>> causal_mask(2, 3).int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with n_head heads: x (B, T, d_in) → (B, T, d_out).

    With a cache, x holds only the new tokens. A mask, (n_query, n_key) or (B, 1, n_query, n_key), True where a
    query may look, replaces the causal one. Source: Vaswani et al. 2017, section 3.2.
    """

    def __init__(self, d_in, d_out, n_head, dropout=0.0, qkv_bias=False):
        super().__init__()
        if d_out % n_head:
            raise ValueError(f"d_out={d_out} is not divisible by n_head={n_head}")
        self.n_head = n_head
        self.dropout = dropout
        self.qkv = Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = Linear(d_out, d_out)

    def forward(self, x, cache=None, mask=None):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, n_head, head_dim)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, n_head, T, head_dim)
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is None and 1 < T < k.shape[2]:
            mask = causal_mask(T, k.shape[2], x.device)
        context = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.dropout if self.training else 0.0, is_causal=mask is None and T > 1
        )
        return self.out_proj(context.transpose(1, 2).reshape(B, T, -1))
