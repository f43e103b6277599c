"""ch05 · The training loop."""

import math
import time

from llm_shared.cli import progress
from llm_shared.loss import autocast, count_targets, evaluate, next_token_loss
import torch
from torch.nn.utils import clip_grad_norm_


def make_optimizer(model, lr, weight_decay=0.1):
    """Return AdamW (Loshchilov and Hutter 2019) in its fused form; only matrices decay, not biases and norms."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def endless(loader, start=0):
    """Yield the batches of a loader, epoch after epoch, from the batch numbered start on."""
    epoch, skip = divmod(start, len(loader))
    while True:
        loader.sampler.epoch = epoch
        for i, batch in enumerate(loader):
            if i >= skip:
                yield batch
        epoch, skip = epoch + 1, 0


def train(
    model, optimizer, loader, val_loader, steps, *, loss_fn=next_token_loss, schedule=None, clip=1.0, accumulate=1,
    dtype=torch.float32, eval_every=100, eval_batches=None, history=None, on_eval=None,
):  # fmt: skip
    """Train model up to step `steps` and return its history, a list of {step, train_loss, val_loss}.

    A batch is a tuple of tensors, the last one the targets; loss_fn(model, *batch) → summed loss. A step takes `accumulate`
    batches as one. schedule: step → learning rate. Every eval_every steps, and last, the losses (nats per target) join
    the history, which says where to go on from, for on_eval(history). A loss that is no number is a FloatingPointError.
    """
    device = next(model.parameters()).device
    history = list(history or [])
    first = history[-1]["step"] if history else 0
    batches = endless(loader, first * accumulate)
    seen_loss, seen_count = 0.0, 0  # since the last evaluation
    model.train()
    bar = progress(range(first, steps), initial=first, total=steps, unit="step", dynamic_ncols=True)
    for step in bar:
        started = time.perf_counter()
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = float(schedule(step))  # numpy's number could not be read back

        micro_batches = [[tensor.to(device) for tensor in next(batches)] for _ in range(accumulate)]
        count = sum(count_targets(batch[-1]) for batch in micro_batches)
        step_loss = 0.0
        for batch in micro_batches:
            with autocast(device, dtype):
                loss = loss_fn(model, *batch) / count
            loss.backward()
            step_loss += loss.item()
        if not math.isfinite(step_loss):
            raise FloatingPointError(f"the loss became {step_loss} at step {step + 1}: try a lower learning rate")
        if clip:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seen_loss, seen_count = seen_loss + step_loss * count, seen_count + count
        speed = f"{count / (time.perf_counter() - started):,.0f} targets/s"
        bar.set_postfix_str(f"loss {step_loss:.3f}, {speed}", refresh=False)
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            val_loss = evaluate(model, val_loader, loss_fn, eval_batches, dtype)
            if not math.isfinite(val_loss):  # before on_eval saves it over the last good checkpoint
                raise FloatingPointError(
                    f"the validation loss became {val_loss} at step {step + 1}: try a lower learning rate"
                )
            history.append({"step": step + 1, "train_loss": seen_loss / seen_count, "val_loss": val_loss})
            seen_loss, seen_count = 0.0, 0
            if on_eval:
                on_eval(history)
    return history
