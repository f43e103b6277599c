"""appendix-D · Learning-rate schedules."""

import math
import warnings


def warmup_cosine(peak, warmup_steps, total_steps, floor=0.0):
    """Return step → learning rate: up in a line to peak at step warmup_steps, then down half a cosine to floor at total_steps.

    Step 0 learns already. A warm-up as long as the run is a warning, other numbers without a sense are a ValueError.
    Source: Loshchilov and Hutter 2017, without restarts.

    >>> rate = warmup_cosine(peak=1.0, warmup_steps=2, total_steps=6)
    >>> [round(rate(step), 2) for step in range(7)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if not (0 <= floor <= peak < math.inf and peak > 0 and 0 <= warmup_steps == warmup_steps // 1 and total_steps >= 1):
        raise ValueError(f"no schedule has {total_steps} steps, warm-up {warmup_steps}, peak {peak}, floor {floor}")
    if warmup_steps >= total_steps:
        warnings.warn(f"warm-up {warmup_steps} of {total_steps} steps never reaches the peak: shorten it", stacklevel=2)

    def rate(step):
        if step < warmup_steps:
            return peak * (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate
