"""Shards of a cache: files of arrays, each finished or not there, named by a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from tqdm import tqdm

from xdistil_fast.model_io import file_digest
from xdistil_fast.train import runs
from xdistil_fast.train.distributed import Ranks

SHARD_SENTENCES = 4096
MANIFEST = "manifest.json"
_ABANDONED_SECONDS = 3600.0

T = TypeVar("T")
Arrays = dict[str, npt.NDArray[Any]]


class Shards:
    """The shards of a cache folder as they are made.

    Attributes:
        key: SHA-256 of what the shards depend on.
        folder: where they lie.
        done: entries of the shards that are finished and intact, by name.
        complete: whether these are all.
        ranks: the processes that make them.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        """Find what is there already.

        Args:
            root: cache folder, made where missing.
            about: all that the shards depend on, but for their size; plain JSON values.
            ranks: the processes that make them together; this one alone if None.
        """
        self.ranks = ranks or Ranks()
        about = {**about, "shard_sentences": SHARD_SENTENCES}
        self.key = digest_of(about)
        self.folder = root / self.key[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.first:
            _remove_abandoned(self.folder)
        manifest = _read_manifests(self.folder)
        self._about = about
        found: dict[str, dict[str, Any]] = manifest["shards"]
        self.done = {
            name: entry for name, entry in found.items() if _intact(self.folder / name, entry)
        }
        self.ranks.wait()  # all have read before anybody writes
        self.complete = bool(manifest.get("complete")) and len(self.done) == len(found)
        if damaged := sorted(found.keys() - self.done.keys()):
            tqdm.write(f"{self.folder}: damaged, made anew: {', '.join(damaged)}", file=sys.stderr)

    def fill(
        self,
        items: Iterable[T],
        label: Callable[[list[T], tqdm[Any]], Arrays],
        *,
        title: str,
        expected: int | None = None,
        progress: bool = True,
    ) -> None:
        """Make the shards that are missing.

        Args:
            items: sentences or texts; streamed.
            label: arrays of a shard from its items; moves the bar on by their pieces.
            title: of the bar.
            expected: number of items, about; lets the bar guess when it will be full.
            progress: show a bar, in pieces.

        Raises:
            OSError: a full disk, say; what is finished stays.
        """
        ranks, entry = self.ranks, {"about": self._about}
        # Files are small against the number of ranks now and then: not always the first one's turn.
        turn = int(self.key[:8], 16)
        # Where several work, each writes down what was there before as well: nothing is lost when
        # one manifest replaces another.
        own_manifest = self.folder / (
            MANIFEST if ranks.size == 1 else f"manifest-{ranks.rank}.json"
        )
        count = 0
        with tqdm(
            desc=title,
            unit="piece",
            unit_scale=True,
            disable=None if progress else True,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            for number, chunk in enumerate(_chunks(items, SHARD_SENTENCES)):
                name = f"shard-{number:05d}.safetensors"
                if name in self.done:
                    bar.update(self.done[name]["pieces"])
                elif (turn + number) % ranks.size == ranks.rank:
                    self.done[name] = _write_shard(self.folder / name, label(chunk, bar))
                    self.done = dict(sorted(self.done.items()))
                    runs.write_json(own_manifest, {**entry, "shards": self.done})
                else:
                    continue
                count += len(chunk)
                if expected:
                    bar.total = round(bar.n * max(1.0, expected / ranks.size / count))
        ranks.wait()
        if ranks.size > 1:
            self.done = _read_manifests(self.folder)["shards"]
        ranks.wait()
        if ranks.first:
            whole = {**entry, "complete": True, "shards": self.done}
            runs.write_json(self.folder / MANIFEST, whole)
            for file in self.folder.glob("manifest-*.json"):
                file.unlink()
        ranks.wait()


def digest_of(value: object) -> str:
    """SHA-256 of plain JSON values, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _remove_abandoned(folder: Path) -> None:
    """Removes files that a run which was killed had half written; younger ones may be another's."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _write_shard(path: Path, arrays: Arrays) -> dict[str, Any]:
    """Write beside and rename; the shard's entry of the manifest."""
    blob = save(arrays)
    runs.write_file(path, blob)
    return {
        "sentences": len(arrays["cu_seqlens"]) - 1,
        "pieces": len(arrays["ids"]),
        "bytes": len(blob),
        "digest": hashlib.sha256(blob).hexdigest(),
    }


def _read_manifests(folder: Path) -> dict[str, Any]:
    """All manifests as one; one that is missing or damaged counts as empty.

    What it would have named is made anew.
    """
    merged: dict[str, Any] = {"shards": {}}
    for path in [folder / MANIFEST, *sorted(folder.glob("manifest-*.json"))]:
        try:
            manifest = json.loads(path.read_text("utf-8"))
            shards = dict(manifest.get("shards", {}))
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            continue
        merged["shards"] |= shards
        merged["complete"] = merged.get("complete") or manifest.get("complete")
    return {**merged, "shards": dict(sorted(merged["shards"].items()))}


def _intact(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        same_size = path.stat().st_size == int(entry["bytes"])
        return same_size and file_digest(path) == str(entry["digest"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):  # or an entry that is none
        return False


def map_shard(path: Path) -> Arrays:
    """Arrays of a safetensors file as views of its mapped bytes: nothing is read here."""
    mapped = np.memmap(path, np.uint8, "r")
    begin = 8 + int(mapped[:8].view("<u8")[0])
    header = json.loads(mapped[8:begin].tobytes())
    types = {"U64": "<u8", "I32": "<i4", "I16": "<i2", "U8": "u1", "F16": "<f2"}
    return {
        name: mapped[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
        .view(types[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
