"""ch04 · The GPT model: configuration, layer norm, GELU, feed-forward, transformer block, GPTModel."""

from dataclasses import dataclass

from llm_shared.attention import KVCache, MultiHeadAttention, causal_mask
from llm_shared.linear import Linear, linear
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    """The numbers that fix a GPT's shape; the defaults are GPT-2 small (Radford et al. 2019, table 2)."""

    vocab_size: int = 50257
    context_length: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12
    dropout: float = 0.0
    qkv_bias: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_embd", "n_head", "n_layer"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")


CONFIGS = {
    "mini": GPTConfig(context_length=256, n_embd=256, n_head=4, n_layer=4),
    "gpt2-small (124M)": GPTConfig(),
    "gpt2-medium (355M)": GPTConfig(n_embd=1024, n_head=16, n_layer=24),
    "gpt2-large (774M)": GPTConfig(n_embd=1280, n_head=20, n_layer=36),
    "gpt2-xl (1558M)": GPTConfig(n_embd=1600, n_head=25, n_layer=48),
}


class LayerNorm(nn.Module):
    """Shift and scale each vector to mean 0 and variance 1, then by learned amounts: (..., n_embd) → same (Ba et al. 2016)."""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x):
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class GELU(nn.Module):
    """GPT-2's activation, the tanh form of GELU: any shape → same (Hendrycks and Gimpel 2016)."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Widen each position four times, bend it, narrow it again: (B, T, n_embd) → same."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = GELU()
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.down(self.gelu(self.up(x)))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind a layer norm and beside a shortcut: (B, T, n_embd) → same."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = MultiHeadAttention(config.n_embd, config.n_embd, config.n_head, config.dropout, config.qkv_bias)
        self.ln_2 = LayerNorm(config.n_embd)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, mask=None):
        x = self.add(x, self.attn(self.ln_1(x), cache, mask))
        return self.add(x, self.ffn(self.ln_2(x)))

    def add(self, x, change):
        """The shortcut: x + change, with dropout while training."""
        return x + (self.dropout(change) if self.training else change)


class GPTModel(nn.Module):
    """GPT-2 with tied input embedding and output head: token ids (B, T) → logits (B, T, vocab_size)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.context_length, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self):
        """Draw the weights as GPT-2 does: N(0, 0.02), biases 0, projections into the residual stream narrower."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                residual = name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * self.config.n_layer) ** 0.5 if residual else 0.02)

    def make_caches(self, batch_size, max_length):
        """Return one empty KVCache per block, for up to max_length tokens."""
        c, weight = self.config, self.tok_emb.weight
        shape = (batch_size, c.n_head, max_length, c.n_embd // c.n_head)
        return [KVCache(*shape, dtype=weight.dtype, device=weight.device) for _ in self.blocks]

    def hidden(self, ids, caches=None, real=None):
        """Return the (B, T, n_embd) vectors that the head turns into logits.

        With caches, ids holds only the new tokens. real (B, past + T) is False at padding on the left: not looked at.
        """
        T = ids.shape[1]
        total = T + (caches[0].length if caches else 0)
        if total > self.config.context_length:
            raise ValueError(f"{total} tokens do not fit the context of {self.config.context_length}")
        positions = torch.arange(total - T, total, device=ids.device)  # (T)
        mask = None
        if real is not None:
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, -T:]  # (B, T)
            itself = torch.eye(T, total, dtype=torch.bool, device=ids.device).roll(total - T, 1)
            mask = causal_mask(T, total, ids.device) & real[:, None, None, :] | itself  # (B, 1, T, total)
        x = self.dropout(self.tok_emb(ids) + self.pos_emb(positions))  # (B, T, n_embd)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache, mask)
        return self.ln_f(x)

    def head(self, hidden):
        """Return the logits (..., vocab_size) of hidden (..., n_embd), through the embedding's own weights."""
        return linear(hidden, self.tok_emb.weight)

    def forward(self, ids, caches=None, real=None, last_only=False):
        hidden = self.hidden(ids, caches, real)
        return self.head(hidden[:, -1:] if last_only else hidden)
