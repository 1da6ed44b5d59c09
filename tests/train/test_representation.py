from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.representation import (
    SAMPLE_SENTENCES,
    Components,
    kept_components,
    principal_components,
    spread,
    stored_components,
)

N, D = 60, 7
RNG = np.random.default_rng(3)
STATES = (RNG.standard_normal((N, D)) @ RNG.standard_normal((D, D)) + 5).astype(np.float32)


def components(size: int, states: np.ndarray = STATES, parts: int = 3) -> Components:
    def feed(add: object) -> None:
        for part in np.array_split(states, parts):
            assert callable(add)
            assert add(part).shape == (len(part), 0)

    return principal_components(feed, size)


@pytest.mark.parametrize("size", [1, 3, D])
def test_components_are_those_of_a_singular_value_decomposition(size: int) -> None:
    reduced = components(size)(STATES)
    assert reduced.dtype == np.float32
    centred = STATES.astype(np.float64) - STATES.mean(axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (left * values)[:, :size]
    expected /= np.sqrt((expected**2).mean())
    np.testing.assert_allclose(np.abs(reduced), np.abs(expected), rtol=1e-3, atol=1e-4)
    assert float((reduced**2).mean()) == pytest.approx(1.0, rel=1e-4)


def test_all_components_keep_all_distances() -> None:
    reduced = components(D)(STATES).astype(np.float64)
    wide = STATES.astype(np.float64)
    ratio = np.linalg.norm(reduced[1:] - reduced[0], axis=1)
    ratio /= np.linalg.norm(wide[1:] - wide[0], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_batches_make_no_difference() -> None:
    np.testing.assert_allclose(components(3).directions, components(3, parts=1).directions, 1e-5)


def test_fewer_states_than_components() -> None:
    reduced = components(5, STATES[:2], parts=1)(STATES[:2])
    assert np.isfinite(reduced).all()
    assert np.isfinite(components(2, STATES[:1], parts=1)(STATES)).all()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"representation_size is 8; .* allowed: 0 to 7"):
        components(8)
    with pytest.raises(ValueError, match="no piece"):
        principal_components(lambda add: None, 2)


@pytest.mark.parametrize(
    ("settings", "width", "expected"),
    [
        ({}, 384, 128),
        ({}, 16, 16),
        ({"representation_size": 8}, 16, 8),
        ({"representation_size": 0}, 16, 0),
        ({"representation_loss": "kld"}, 384, 0),
    ],
)
def test_components_that_are_kept(settings: dict[str, Any], width: int, expected: int) -> None:
    config = DistillConfig("t", ("a",), ("b",), "o", **settings)
    assert kept_components(config, SimpleNamespace(hidden_size=width)) == expected


@pytest.mark.parametrize("damage", ["truncate", "text", "empty", "shape"])
def test_stored_components_are_found_again_or_made_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "components.safetensors"
    first, digest = stored_components(path, lambda: components(3))
    blob = path.read_bytes()

    def fail() -> Components:
        raise AssertionError

    again, same = stored_components(path, fail)
    assert same == digest
    np.testing.assert_array_equal(again.directions, first.directions)
    if damage == "shape":
        path.unlink()
        stored_components(path, lambda: Components(first.mean, first.mean))
    else:
        path.write_bytes({"truncate": blob[:-9], "text": b"not tensors", "empty": b""}[damage])
    _, mended = stored_components(path, lambda: components(3))
    assert mended == digest
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("count", [0, 1, SAMPLE_SENTENCES, SAMPLE_SENTENCES + 1, 5000])
def test_sample_is_spread(count: int) -> None:
    sample = spread([(str(i),) for i in range(count)])
    assert len(sample) <= SAMPLE_SENTENCES
    assert len(sample) >= min(count, SAMPLE_SENTENCES // 2)
    if count:
        assert int(sample[-1][0]) >= 0.9 * count - 1
