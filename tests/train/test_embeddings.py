from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xdistil_fast.train.embeddings import (
    SCALE,
    file_embeddings,
    random_embeddings,
    svd_embeddings,
)

RNG = np.random.default_rng(7)
TABLE = (RNG.standard_normal((90, 12)) * np.linspace(0.3, 0.01, 12)).astype(np.float32)


def distances(values: np.ndarray) -> np.ndarray:
    return np.linalg.norm(values[:, None].astype(np.float64) - values[None], axis=2)


def test_full_rank_keeps_all_distances() -> None:
    out = svd_embeddings(TABLE, 12)
    ratio = distances(out)[~np.eye(90, dtype=bool)] / distances(TABLE)[~np.eye(90, dtype=bool)]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)


def test_projection_is_the_best_of_its_rank() -> None:
    # Eckart and Young: what the first E singular values do not explain is all that is lost.
    centred = TABLE.astype(np.float64) - TABLE.mean(axis=0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    out = svd_embeddings(TABLE, 4).astype(np.float64)
    weights = np.linalg.lstsq(out, centred, rcond=None)[0]
    lost = np.linalg.norm(centred - out @ weights)
    assert lost == pytest.approx(np.sqrt((singular[4:] ** 2).sum()), rel=1e-4)


def test_scale_and_order_of_columns() -> None:
    out = svd_embeddings(TABLE, 6)
    assert out.shape == (90, 6)
    assert out.dtype == np.float32
    assert out.std() == pytest.approx(SCALE, rel=1e-5)
    spread = out.std(axis=0)
    assert (spread[:-1] >= spread[1:]).all()


def test_more_columns_than_rank_are_zero() -> None:
    out = svd_embeddings(TABLE, 15)
    assert out.shape == (90, 15)
    assert not out[:, 12:].any()
    assert out[:, :12].any(axis=0).all()


def test_signs_do_not_hang_on_the_solver() -> None:
    np.testing.assert_allclose(
        svd_embeddings(TABLE, 5), svd_embeddings(TABLE[:, ::-1], 5), atol=2e-4
    )


@pytest.mark.parametrize(("table", "what"), [(TABLE * np.nan, "NaN"), (TABLE * 0, "equal rows")])
def test_useless_tables_are_refused(table: np.ndarray, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        svd_embeddings(table, 4)


def test_random_follows_the_seed() -> None:
    first = random_embeddings(400, 10, 3)
    np.testing.assert_array_equal(first, random_embeddings(400, 10, 3))
    assert (first != random_embeddings(400, 10, 4)).mean() > 0.99
    assert first.std() == pytest.approx(SCALE, rel=0.05)


def test_npy_file_gives_the_rows_of_the_kept_pieces(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", TABLE)
    ids = np.array([0, 5, 89])
    out = file_embeddings(tmp_path / "t.npy", ["a", "b", "c"], ids, 12, 0)
    np.testing.assert_array_equal(out, TABLE[ids])


def test_text_file_is_read_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("3 2\n##b 1 -2.5\nzz 9 9\na 0.25 3e-1\n", encoding="utf-8")
    out = file_embeddings(path, ["a", "##b", "c"], np.arange(3), 2, seed=5)
    np.testing.assert_array_equal(out[:2], np.float32([[0.25, 0.3], [1, -2.5]]))
    np.testing.assert_array_equal(out[2], random_embeddings(3, 2, 5)[2])


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("t.txt", b"a 1 2 3\n", "line 1: 3 values; the student's size is 2"),
        ("t.txt", b"a 1 x\n", "line 1: values must be numbers"),
        ("t.txt", b"zz 1 2\n", "none of the student's 2 pieces"),
        ("t.txt", b"a 1 nan\n", "NaN"),
        ("t.npy", b"no array", "not a .npy file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=what) as caught:
        file_embeddings(path, ["a", "b"], np.arange(2), 2, 0)
    assert str(path) in str(caught.value)


def test_npy_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", TABLE)
    with pytest.raises(ValueError, match=r"shape \[90, 12\]; allowed: \[95 or more, 12\]"):
        file_embeddings(tmp_path / "t.npy", ["a"], np.array([94]), 12, 0)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        file_embeddings(tmp_path / "t.npy", ["a"], np.array([0]), 2, 0)
