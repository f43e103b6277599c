"""ch05 · The next-token loss, taken through the head in chunks, its average over a data set, and what to compare it with."""

import math
from itertools import islice

import numpy as np
import torch

IGNORED = -100  # a target with this value does not count
CHUNK = 512  # positions whose logits exist at one time


def cross_entropies(rows, weight, target):
    """Return each row's cross-entropy, nats (chunk, 1), and the probabilities (chunk, vocab_size) for its gradient."""
    logits = rows @ weight.T  # (chunk, vocab_size)
    probs = logits.softmax(dim=-1, dtype=logits.dtype)  # else a GPU's autocast makes it float32
    p = probs.gather(1, target).float()
    losses = -p.log()
    lost = p < max(torch.finfo(dtype).tiny for dtype in (torch.float32, probs.dtype))
    if lost.any():  # then from the likeliest token, whose p is not: log Σ exp = its logit - log of its p
        log_sum = logits.amax(1, keepdim=True).float() - probs.amax(1, keepdim=True).float().log()
        losses = torch.where(lost, log_sum - logits.gather(1, target).float(), losses)
    return losses, probs


class HeadCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T, in nats, without ever holding the logits of the whole batch.

    hidden (N, n_embd), weight (vocab_size, n_embd), targets (N) → scalar. Each chunk of logits is used at once: the
    gradient of cross-entropy, softmax(logits) - one_hot(target), needs nothing that comes later.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        x, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        train = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if train else None
        grad_weight = torch.zeros_like(weight) if train else None
        for start in range(0, len(x), CHUNK):
            rows = x[start : start + CHUNK]  # (chunk, n_embd)
            target = targets[start : start + CHUNK, None]  # (chunk, 1)
            counts = target != IGNORED
            target = target.where(counts, 0)
            losses, probs = cross_entropies(rows, w, target)
            total += losses.where(counts, 0).sum()
            if train:
                grad_logits = probs.scatter_add_(1, target, -torch.ones_like(target, dtype=dtype))
                if not counts.all():
                    grad_logits *= counts
                grad_x[start : start + CHUNK] = grad_logits @ w
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad_logits.T, rows)
                else:
                    grad_weight += grad_logits.T @ rows
        if train:
            ctx.save_for_backward(grad_x.to(hidden.dtype), grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None


def next_token_loss(model, inputs, targets):
    """Return the summed cross-entropy (nats) of a batch; inputs and targets (B, T)."""
    hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, n_embd)
    return HeadCrossEntropy.apply(hidden, model.tok_emb.weight, targets.flatten())


def count_targets(targets):
    """Return how many targets count."""
    return int((targets != IGNORED).sum())


@torch.no_grad()
def evaluate(model, loader, loss_fn=next_token_loss, batches=None, dtype=torch.float32):
    """Return the mean loss (nats) per target over a loader, or its first batches; looking changes nothing of the run."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.random.fork_rng(devices=[]), autocast(device, dtype):  # a DataLoader may draw a seed of its own
        for batch in islice(loader, batches):
            batch = [tensor.to(device) for tensor in batch]
            total += loss_fn(model, *batch).item()
            count += count_targets(batch[-1])
    model.train(was_training)
    if not count:
        raise ValueError("there is no target to evaluate on")
    return total / count


def autocast(device, dtype):
    """Return the context in which products run in dtype, while weights and sums stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def unigram_entropy(tokens):
    """Return the entropy (nats per token) of how often each token occurs: the loss of the best model without context."""
    counts = np.zeros(int(np.max(tokens)) + 1, np.int64)
    for start in range(0, len(tokens), 1 << 20):  # a token file may be larger than the memory
        counts += np.bincount(tokens[start : start + (1 << 20)], minlength=len(counts))
    probs = counts[counts > 0] / len(tokens)
    return float(-(probs * np.log(probs)).sum())


def bits_per_byte(loss, n_tokens, n_bytes):
    """Turn a loss in nats per token into bits per byte of text, which compares across tokenizers."""
    return loss / math.log(2) * n_tokens / n_bytes
