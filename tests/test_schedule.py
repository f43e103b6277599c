import math
import warnings

from llm_shared.schedule import warmup_cosine
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (9, 10), (1, 2), (0, 1)])
def test_equals_transformers_one_step_ahead(warmup, total):
    """transformers starts at 0, from which nothing is learned: our step 0 is their step 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup + 1, total + 1)
    ours = warmup_cosine(0.3, warmup, total)
    for step in range(total):
        optimizer.step()
        theirs.step()
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 50])
def test_each_step_learns_and_the_peak_is_reached(warmup):
    rate = warmup_cosine(2.0, warmup, warmup + 1)
    rates = [rate(step) for step in range(warmup + 1)]
    assert rates[0] > 0 and rates == sorted(set(rates)) and rates[-1] == 2.0
    steps = [b - a for a, b in zip([0.0, *rates], rates, strict=False)]
    assert steps == pytest.approx([2.0 / (warmup + 1)] * (warmup + 1))  # a line through 0, one step before the first


def test_floor():
    rate = warmup_cosine(1.0, 2, 10, floor=0.1)
    assert rate(2) == 1.0 and rate(10) == pytest.approx(0.1) and rate(99) == pytest.approx(0.1)
    assert warmup_cosine(1.0, 2, 10, floor=1.0)(7) == 1.0


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (50, 5), (1, 1)])
def test_a_warmup_as_long_as_the_run_warns(warmup, total):
    with pytest.warns(
        UserWarning, match=f"warm-up {warmup} of {total} steps never reaches the peak: shorten it"
    ) as told:
        rate = warmup_cosine(1.0, warmup, total)
    assert told[0].filename == __file__
    assert rate(0) > 0 and rate(total - 1) < 1 and rate(warmup + 3) == 0  # it may be trained on


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 2), (9, 10), (80, 10**6), (3, math.inf)])
def test_a_shorter_one_does_not(warmup, total):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warmup_cosine(1.0, warmup, total)


@pytest.mark.parametrize(
    "change",
    [
        {"peak": -1.0},
        {"peak": 0.0},
        {"peak": math.nan},
        {"peak": math.inf, "floor": math.inf},
        {"floor": -0.1},
        {"floor": 1.1},
        {"floor": math.nan},
        {"warmup_steps": -1},
        {"warmup_steps": 0.1},  # a share of the steps, as other libraries take it
        {"warmup_steps": math.nan},
        {"warmup_steps": math.inf},
        {"total_steps": 0},
        {"total_steps": -5},
        {"total_steps": math.nan},
    ],
)
def test_nonsense_is_refused(change):
    with pytest.raises(ValueError, match="^no schedule has .* steps, warm-up .*, peak .*, floor .*$"):
        warmup_cosine(**({"peak": 1.0, "warmup_steps": 2, "total_steps": 10} | change))
