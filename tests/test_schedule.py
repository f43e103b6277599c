import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from llm_shared.schedule import warmup_cosine


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 2)])
def test_equals_transformers(warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    ours = warmup_cosine(0.3, warmup, total)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_floor():
    rate = warmup_cosine(1.0, 2, 10, floor=0.1)
    assert rate(2) == 1.0 and rate(10) == pytest.approx(0.1) and rate(99) == pytest.approx(0.1)
