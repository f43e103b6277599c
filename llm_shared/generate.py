"""ch05 · From prompts to text: batched, cached, sampled, token by token."""

import codecs
import math

import torch


def sample(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """Draw the next token of each row: logits (B, vocab_size) → ids (B).

    Temperature 0 takes the likeliest, top_k keeps the k likeliest, top_p the fewest likeliest that together reach p
    (Holtzman et al. 2020); the generator fixes the draw. Logits that are no numbers are a FloatingPointError.
    """
    if not (0 <= temperature < math.inf and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)):
        raise ValueError("temperature must be a number of at least 0, top_k at least 1, top_p above 0 and at most 1")
    top = logits.max(dim=-1)  # finds the same places as argmax, several times as fast on a CPU
    if not top.values.isfinite().all():
        raise FloatingPointError("the model's logits are no numbers any more: its weights are damaged or diverged")
    if temperature < 1e-6 or top_k == 1:
        return top.indices
    if top_k is not None:
        kept, places = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(1, places, kept)
    logits = (logits.float() - top.values[:, None]) / min(temperature, 1e9)  # (B, vocab_size), the likeliest at 0
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        enough = probs.cumsum(dim=-1) - probs >= max(top_p, 1e-9)  # those before it suffice
        logits = logits.scatter(1, places, ordered.masked_fill(enough, -torch.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, eot_id=None, use_cache=True, generator=None, **sampling):
    """Yield, step by step, the new id of each prompt, or None for one that has reached eot_id.

    prompts: lists of ids, of any lengths; an empty one starts from eot_id. Past context_length every position shifts at
    each step, so the whole window is computed anew. sampling: as for `sample`. Foreign ids are a ValueError.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    prompts = [list(prompt) or [eot_id] for prompt in prompts]
    if [None] in prompts:
        raise ValueError("an empty prompt has no token to start from: give eot_id")
    if not prompts:
        return
    device, context = model.tok_emb.weight.device, model.config.context_length
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.long, device=device)
    real = torch.ones_like(ids, dtype=torch.bool)  # False at the padding, which stands on the left
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) : width] = torch.tensor(prompt, device=device)
        real[row, : width - len(prompt)] = False
    if not 0 <= ids.min() <= ids.max() < model.config.vocab_size:
        raise ValueError(f"token ids run from 0 to {model.config.vocab_size - 1}: take the model's own tokenizer")
    padded = not real.all()
    caches, done = None, [False] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for end in range(width, width + max_new_tokens):
            start = max(0, end - context)
            if not use_cache or start > 0:
                caches, seen = None, start
            elif caches is None:
                caches, seen = model.make_caches(len(prompts), min(context, width + max_new_tokens)), 0
            else:
                seen = end - 1
            mask = real[:, start:end] if padded else None
            logits = model(ids[:, seen:end], caches, mask, last_only=True)[:, -1]  # (B, vocab_size)
            ids[:, end] = drawn = sample(logits, generator=generator, **sampling)  # (B)
            step = drawn.tolist()
            done = [ended or new == eot_id for ended, new in zip(done, step, strict=True)]
            if all(done):
                return
            yield [None if ended else new for ended, new in zip(done, step, strict=True)]
    finally:
        model.train(was_training)


def generate(model, prompts, max_new_tokens, **options):
    """Return each prompt followed by its new ids, eot_id left out, as lists; options as for `stream`."""
    rows = [list(prompt) for prompt in prompts]
    for step in stream(model, prompts, max_new_tokens, **options):
        for row, new in zip(rows, step, strict=True):
            if new is not None:
                row.append(new)
    return rows


def stream_text(tokenizer, ids):
    """Yield the text of ids as they come; the bytes of a character split between tokens wait for each other."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)
