"""How the learning rate rises and falls."""

from __future__ import annotations

import math


def rate_factor(step: int, steps: int, warmup: float, decay: str = "linear") -> float:
    """Factor on the highest learning rate.

    Args:
        step: from 0.
        steps: of all.
        warmup: share of the steps in which it rises from 0.
        decay: how it falls to 0 afterwards, ``linear`` or ``cosine``.
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    left = (steps - step) / max(1, steps - rising)
    return left if decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
