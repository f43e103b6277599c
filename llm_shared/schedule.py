"""appendix-D · Learning-rate schedules."""

import math


def warmup_cosine(peak, warmup_steps, total_steps, floor=0.0):
    """Return step → learning rate: up in a line to peak over warmup_steps, then down half a cosine to floor.

    Source: Loshchilov and Hutter 2017, without restarts.

    >>> rate = warmup_cosine(peak=1.0, warmup_steps=2, total_steps=6)
    >>> [round(rate(step), 2) for step in range(7)]
    [0.0, 0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """

    def rate(step):
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate
