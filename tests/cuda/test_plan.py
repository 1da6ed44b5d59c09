"""Plans: every device gets one that fits it, and what they lay out in shared memory is sound."""

from __future__ import annotations

from typing import Any

import pytest

# Processors, shared memory of a block, largest cluster.
DEVICES = {
    "A100": (108, 166_912, 1),
    "L4": (58, 101_376, 1),
    "H100": (132, 232_448, 16),
    "H200 with clusters of 8": (132, 232_448, 8),
    "RTX 5090": (170, 101_376, 8),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("hidden", [1, 50, 100, 200, 600])
@pytest.mark.parametrize("backward", [False, True])
def test_every_device_has_a_plan(
    emulated: Any, name: str, kind: str, hidden: int, backward: bool
) -> None:
    _, shared_memory, max_cluster = DEVICES[name]
    if kind == "int8" and backward:
        with pytest.raises(ValueError, match="has no backward pass"):
            emulated.lstm_plan(kind, backward, hidden, 32, *DEVICES[name])
        return
    # Gates' gradients of 8 sequences, twice: such a student trains in float32 on Hopper alone, and
    # in bfloat16 on all.
    needed = {
        "int8": 0,
        "bfloat16": 0,
        "float32": 175_000,
        "float64": 110_000 + 140_000 * (hidden == 600),
    }
    too_small = shared_memory < needed[kind] and hidden in (200, 600) and backward
    too_small &= kind == "float64" or hidden == 600
    too_small |= (name, kind, hidden) == ("L4", "float64", 600)
    if too_small:
        with pytest.raises(ValueError, match=f"does not fit the {shared_memory} bytes"):
            emulated.lstm_plan(kind, backward, hidden, 32, *DEVICES[name])
        return
    plan = emulated.lstm_plan(kind, backward, hidden, 32, *DEVICES[name])
    assert plan.shared_memory <= shared_memory
    assert plan.cluster <= max_cluster
    assert 1 <= plan.warps <= (16 if plan.resident else 8)


@pytest.mark.parametrize(("hidden", "cluster"), [(100, 1), (200, 2), (600, 16)])
def test_weights_stay_in_shared_memory_on_hopper(emulated: Any, hidden: int, cluster: int) -> None:
    plan = emulated.lstm_plan("bfloat16", False, hidden, 32, *DEVICES["H100"], 8, cluster)
    assert plan.resident


def test_bytes_of_a_direction_fit_one_processor_of_hopper(emulated: Any) -> None:
    for kind, fits in (("int8", True), ("bfloat16", False)):
        assert emulated.lstm_plan(kind, False, 200, 32, *DEVICES["H100"], 8, 1).resident == fits


def test_a_large_batch_takes_wide_tiles_and_a_small_one_many_blocks(emulated: Any) -> None:
    small = emulated.lstm_plan("bfloat16", False, 200, 32, *DEVICES["H100"])
    large = emulated.lstm_plan("bfloat16", False, 200, 4096, *DEVICES["H100"])
    assert small.rows <= large.rows
    assert small.cluster >= large.cluster
    assert large.rows == 32


def test_a_plan_that_cannot_be_is_refused(emulated: Any) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        emulated.lstm_plan("bfloat16", False, 8, 32, *DEVICES["H100"], 8, 2)
    plan = emulated.lstm_plan("float32", False, 32, 1, *DEVICES["H100"], 32, 1)
    with pytest.raises(ValueError, match="plan: is not one"):
        emulated.lstm_backward("float32", 32, plan, 1, 1, *([0] * 7), 0, 0)


@pytest.mark.parametrize("hidden", range(1, 80))
def test_rows_of_the_exchange_lie_in_different_banks(hidden: int) -> None:
    """Tensor cores: the 32 words that a warp reads at once, 4 of each of 8 rows (lstm_layout)."""
    for steps in ((hidden + 15) // 16, (hidden + 15) // 16 * 4):
        stride = (steps * 16 + 8) // 2  # in words
        assert sorted((row * stride + q) % 32 for row in range(8) for q in range(4)) == [*range(32)]
