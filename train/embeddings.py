"""Start values of the student's embedding table.

The teacher's word-piece table [V, D] is cut to the student's pieces and projected on its E
strongest directions (SVD). The result is scaled as a whole to a standard deviation of
:data:`SCALE`: the LSTM's input weights start at 1/sqrt(H), so much smaller values would leave the
gates half open for all pieces alike, and the learning rate would have to make up for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

SCALE = 1.0  # standard deviation over all elements, that of torch.nn.Embedding


def svd_embeddings(table: npt.NDArray[np.floating], size: int) -> FloatArray:
    """Project a table on its strongest directions.

    Args:
        table: [V, D], the teacher's rows of the student's pieces.
        size: E; if it exceeds the rank of the table, the further columns are 0.

    Returns:
        [V, E], columns by falling variance, standard deviation :data:`SCALE`.

    Raises:
        ValueError: the table holds NaN or infinity, or is 0 everywhere.
    """
    if not np.isfinite(table).all():
        raise ValueError("the teacher's word-piece table holds NaN or infinity")
    centred = table.astype(np.float64)
    centred -= centred.mean(axis=0)
    # Directions from the D x D Gram matrix: V is much larger than D, and the eigenvectors of a
    # symmetric matrix need no V x V part. Signs are fixed, so that the start is reproducible.
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][:size]
    directions = vectors[:, order]
    pivots = np.abs(directions).argmax(axis=0)
    directions *= np.sign(directions[pivots, np.arange(directions.shape[1])])
    projected = centred @ directions
    out = np.zeros((len(table), size), np.float32)
    out[:, : projected.shape[1]] = projected
    deviation = float(out.std())
    if not deviation:
        raise ValueError("the teacher's word-piece table has equal rows only")
    out *= np.float32(SCALE / deviation)
    return out


def random_embeddings(rows: int, size: int, seed: int) -> FloatArray:
    """Normally distributed values of standard deviation :data:`SCALE`, [rows, size]."""
    generator = np.random.default_rng([seed, 0x656D62])
    out = generator.standard_normal((rows, size), np.float32)
    out *= np.float32(SCALE)
    return out


def file_embeddings(
    path: Path | str, pieces: list[str], teacher_ids: npt.NDArray[np.integer], size: int, seed: int
) -> FloatArray:
    """Read start values from a file.

    Args:
        path: ``.npy`` with one row a piece of the teacher's vocabulary, or text with lines
            ``piece v1 ... vE`` (word2vec's and GloVe's form; a first line of counts is skipped).
        pieces: the student's V pieces.
        teacher_ids: [V] the teacher's id of each.
        size: E.
        seed: of the random rows given to pieces that a text file lacks.

    Returns:
        [V, E] as in the file, not rescaled.

    Raises:
        ValueError: another width, too few rows, not numbers, or not finite.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
        needed = int(teacher_ids.max()) + 1
        if table.ndim != 2 or table.shape[1] != size or len(table) < needed:
            raise ValueError(
                f"{path}: has shape {list(table.shape)}; allowed: [{needed} or more, {size}]"
            )
        out = np.asarray(table[teacher_ids], np.float32)
    else:
        out = _read_text(path, pieces, size, seed)
    if not np.isfinite(out).all():
        raise ValueError(f"{path}: holds NaN or infinity")
    return out


def _read_text(path: Path, pieces: list[str], size: int, seed: int) -> FloatArray:
    index = {piece: row for row, piece in enumerate(pieces)}
    out = random_embeddings(len(pieces), size, seed)
    found = 0
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            piece, *values = line.rstrip("\n").rstrip(" ").split(" ")
            if number == 1 and len(values) == 1:
                continue
            if len(values) != size:
                raise ValueError(
                    f"{path}, line {number}: {len(values)} values; the student's size is {size}"
                )
            if (row := index.get(piece)) is None:
                continue
            try:
                out[row] = [float(value) for value in values]
            except ValueError:
                raise ValueError(f"{path}, line {number}: values must be numbers") from None
            found += 1
    if not found:
        raise ValueError(f"{path}: holds none of the student's {len(pieces)} pieces")
    return out
