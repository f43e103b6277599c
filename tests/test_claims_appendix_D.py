"""What appendix D and the notebook on schedules claim, with other seeds, texts and sizes than theirs."""

import copy
import json
import math
from functools import cache

from llm_shared.data import create_dataloader
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.loss import IGNORED, count_targets, next_token_loss
from llm_shared.schedule import warmup_cosine
from llm_shared.training import endless, make_optimizer, train
import numpy as np
import pytest
import torch
from samples import ROOT
from torch.nn.utils import clip_grad_norm_
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

SEEDS = pytest.mark.parametrize("seed", [404, 1945])
CONFIG = GPTConfig(vocab_size=256, context_length=32, n_embd=32, n_head=2, n_layer=2)


@cache
def text_bytes():
    """The sixth hundred thousand bytes of Moby-Dick, as tokens."""
    data = (ROOT / "llm_shared/assets/moby-dick.txt").read_bytes()[500_000:600_000]
    return np.frombuffer(data, np.uint8)


def loader(seed, batch_size=8):
    return create_dataloader(text_bytes(), batch_size, 32, 32, seed=seed)


def model_of(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return GPTModel(CONFIG).to(dtype)


def losses_of(model, optimizer, seed, steps, clip, broken=None):
    """A plain loop; at the step called broken nobody divides the loss by the number of targets."""
    losses = []
    for step, (x, y) in zip(range(steps), endless(loader(seed)), strict=False):
        loss = next_token_loss(model, x, y)
        losses.append(loss.item() / y.numel())
        if not math.isfinite(losses[-1]):
            break
        (loss if step == broken else loss / y.numel()).backward()
        clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def grad_of(model, x, y, parts=1, divide=lambda some_y, count, parts: count):
    model.zero_grad()
    for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (next_token_loss(model, some_x, some_y) / divide(some_y, count_targets(y), parts)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@cache
def notebook_schedules():
    """The functions that the notebook on schedules defines."""
    path = ROOT / "ch05/04_learning_rate_schedulers/learning-rate-schedulers.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = {}
    exec("".join(next(cell["source"] for cell in cells if "def warmup_linear" in "".join(cell["source"]))), names)
    return names


@SEEDS
@pytest.mark.parametrize("lr", [7e-4, 5e-3])
def test_the_first_step_of_adamw_is_the_learning_rate(seed, lr):
    model = model_of(seed)
    before = [weight.detach().clone() for weight in model.parameters()]
    losses_of(model, make_optimizer(model, lr, weight_decay=0.0), seed, 1, math.inf)
    moves = torch.cat([(a - b).abs().flatten() for a, b in zip(model.parameters(), before, strict=True)])
    assert ((moves / lr - 1).abs() < 0.02).float().mean() > 0.8


@SEEDS
def test_the_first_thing_learned_makes_all_hidden_vectors_parallel(seed):
    model = model_of(seed)
    x, _ = next(iter(loader(seed)))

    def sameness():
        hidden = torch.nn.functional.normalize(model.hidden(x).detach().flatten(0, 1), dim=-1)
        return (hidden @ hidden.T).mean().item()

    assert sameness() < 0.4
    losses_of(model, make_optimizer(model, 3e-3), seed, 20, 1.0)
    assert sameness() > 0.9


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (7, 31), (20, 400)])
def test_the_other_schedules_equal_transformers_one_step_ahead(warmup, total):
    decay = total // 4
    ours = {
        get_constant_schedule_with_warmup: ("warmup_constant", {}, {}),
        get_linear_schedule_with_warmup: ("warmup_linear", {}, {"num_training_steps": total + 1}),
        get_wsd_schedule: (
            "warmup_stable_decay",
            {"decay_part": decay / total},
            {"num_decay_steps": decay, "num_training_steps": total + 1, "decay_type": "linear"},
        ),
    }
    for theirs, (name, part, options) in ours.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        schedule = theirs(optimizer, num_warmup_steps=warmup + 1, **options)
        rate = notebook_schedules()[name](0.3, warmup, total, **part)
        for step in range(total + 3):
            optimizer.step()
            schedule.step()  # theirs starts at 0, from which nothing is learned
            assert rate(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9), (name, step)


@pytest.mark.parametrize("total", [90, 1300])
def test_cosine_and_linear_travel_half_as_far_and_never_rise_again(total):
    linear = notebook_schedules()["warmup_linear"]
    for schedule in (warmup_cosine, linear):
        rate = schedule(2.0, 0, total)
        assert sum(map(rate, range(total))) / total == pytest.approx(1.0, rel=0.02)
        assert rate(total) == rate(2 * total) == pytest.approx(0.0, abs=1e-12)


@SEEDS
def test_a_falling_rate_settles_where_a_steady_one_shakes(seed):
    rng = np.random.default_rng(seed)

    def end(schedule):
        at = np.zeros(500)  # 500 runs down the same bowl, with noisy gradients
        for step in range(400):
            at -= schedule(step) * (at - 3 + rng.normal(size=500))
        return np.mean((at - 3) ** 2)

    assert end(warmup_cosine(0.1, 0, 400)) < 0.3 * end(lambda step: 0.1)
    assert end(lambda step: 0.2) > 1.5 * end(lambda step: 0.1)


@SEEDS
def test_clipping_by_the_norm_keeps_the_direction(seed):
    model = model_of(seed)
    g = grad_of(model, *next(iter(loader(seed))))
    clip_grad_norm_(model.parameters(), 0.1)
    clipped = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    limit = g.abs().quantile(0.9)
    cosine = torch.nn.functional.cosine_similarity
    assert clipped.norm() == pytest.approx(0.1, rel=1e-3)
    assert cosine(g, clipped, dim=0) > 0.9999 > 0.95 > cosine(g, g.clamp(-limit, limit), dim=0)


@SEEDS
def test_clipping_saves_a_run_that_diverges(seed):
    def run(clip):
        model = model_of(seed)
        return losses_of(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), seed, 60, clip)

    assert not max(run(math.inf)[-20:]) < 10  # not a number, or far above guessing
    assert max(run(1.0)) < 2 * math.log(256)


@SEEDS
def test_one_broken_batch_slows_adamw_unless_clipped(seed):
    def end(clip, broken):
        model = model_of(seed)
        return np.mean(losses_of(model, make_optimizer(model, 1e-3), seed, 80, clip, broken)[-20:])

    fine, hurt, healed = end(math.inf, None), end(math.inf, 40), end(1.0, 40)
    assert hurt > fine + 0.05
    assert abs(healed - fine) < 0.6 * (hurt - fine)


@SEEDS
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_divides_by_all_targets(seed, parts):
    model = model_of(seed, torch.double)
    x, y = next(iter(loader(seed)))
    y[:3, 5:] = IGNORED
    one = grad_of(model, x, y)
    assert (grad_of(model, x, y, parts) - one).abs().max() < 1e-6
    wrong = grad_of(model, x, y, parts, lambda some_y, count, parts: count_targets(some_y) * parts)
    assert (wrong - one).norm() > 0.1 * one.norm()


@SEEDS
def test_decay_of_everything_silences_the_norms(seed):
    def norm_weights(make):
        model = model_of(seed)
        losses_of(model, make(model), seed, 60, 1.0)
        return min(w.abs().mean().item() for name, w in model.named_parameters() if "ln_" in name and "weight" in name)

    everything = norm_weights(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=15.0))
    assert everything < 0.3 < 0.8 < norm_weights(lambda model: make_optimizer(model, 3e-3, 15.0))


@SEEDS
def test_bfloat16_weights_lose_small_steps(seed):
    def moved(model):
        losses_of(model, make_optimizer(model, 5e-4), seed, 12, 1.0)
        return sum((w != 1).sum().item() for name, w in model.named_parameters() if "ln_" in name and "weight" in name)

    assert moved(model_of(seed)) > 0 == moved(model_of(seed, torch.bfloat16))


@SEEDS
def test_a_branch_of_the_trunk_is_a_whole_run(seed):
    decay = notebook_schedules()["warmup_stable_decay"](2e-3, 5, 40)

    def start():
        model = model_of(seed)
        return model, make_optimizer(model, 2e-3)

    data = loader(seed), create_dataloader(text_bytes()[:3201], 50, 32, 32, shuffle=False)
    whole, optimizer = start()
    train(whole, optimizer, *data, 40, schedule=decay)
    trunk, optimizer = start()
    history = train(trunk, optimizer, *data, 30, schedule=notebook_schedules()["warmup_constant"](2e-3, 5, 30))
    branch = copy.deepcopy(trunk)
    again = make_optimizer(branch, 2e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(branch, again, *data, 40, schedule=decay, history=history)
    for a, b in zip(whole.parameters(), branch.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
