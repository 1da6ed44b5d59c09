"""Model folders: `config.json`, `model.safetensors`, `tokenizer.json`, `README.md`.

A folder may come from anybody, so it is data and nothing else: only these four names are ever
opened, nothing in them is executed, and every value is checked against what this version of the
library can run before any of it is used. Every refusal is a `ModelError` that names the file, the
value and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from xdistil_fast import _core
from xdistil_fast.labels import OUTSIDE
from xdistil_fast.model_config import (
    CONFIG_FILE,
    CRF_TENSORS,
    MULTIPLIED_AS_BYTES,
    QUANTIZED,
    ModelConfig,
    ModelError,
    fail,
    parse_config,
    scales_name,
    show,
)

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "FILES",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "ModelConfig",
    "ModelError",
    "ModelFolder",
    "Tensors",
    "count_parameters",
    "embedded_models",
    "file_digest",
    "load_folder",
    "load_tokenizer",
    "resolve_model",
    "save_folder",
]

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE)

_MAX_CONFIG_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 512 << 20
# Times that a normalizer may lengthen a text; those in use at most a few.
_MAX_GROWTH = 256
_EMBEDDED = Path(__file__).parent / "models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# By name: float32, and int8 where a folder of precision "int8" has bytes.
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that passed every check.

    Attributes:
        config: its configuration.
        tensors: C-contiguous arrays by name, exactly those of `config.tensor_shapes()`; float32,
            the matrices of a quantised model int8.
        tokenizer_json: text of `tokenizer.json`.
        path: the folder.
        tokenizer: `tokenizer_json` loaded, truncation and padding off.
        digest: SHA-256 of the bytes of `model.safetensors`, in hex.
    """

    config: ModelConfig
    tensors: Tensors
    tokenizer_json: str
    path: Path
    tokenizer: Tokenizer
    digest: str


def load_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Reads and checks a model folder.

    Args:
        path: the folder.

    Returns:
        Its content; float16 embeddings are widened to float32.

    Raises:
        ModelError: a file that is missing, unreadable or not what `format_version` 1 asks for.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; a model folder holds {', '.join(FILES[:3])}")
    for name in FILES[:3]:
        _require_file(folder / name)
    config = parse_config(_read_text(folder / CONFIG_FILE, _MAX_CONFIG_BYTES), folder / CONFIG_FILE)
    tokenizer_json = _read_text(folder / TOKENIZER_FILE, _MAX_TOKENIZER_BYTES)
    tokenizer = load_tokenizer(tokenizer_json, config.vocab_size, folder / TOKENIZER_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE, config)
    digest = file_digest(folder / WEIGHTS_FILE)
    return ModelFolder(config, tensors, tokenizer_json, folder, tokenizer, digest)


def count_parameters(tensors: Mapping[str, NDArray[Any]]) -> int:
    """Number of trained values; the scales of a quantised model are none."""
    scales = {scales_name(name) for name in QUANTIZED}
    return sum(value.size for name, value in tensors.items() if name not in scales)


def embedded_models() -> list[str]:
    """Returns the sorted names of the models that came with the library."""
    if not _EMBEDDED.is_dir():
        return []
    return sorted(item.name for item in _EMBEDDED.iterdir() if (item / CONFIG_FILE).is_file())


def resolve_model(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Finds the folder of a model.

    Tried in order: a folder of that path, an embedded model of that name, a model repository
    `owner/name` on the Hugging Face Hub (its local copy when offline), of which only the four
    files of a model folder are fetched.

    Args:
        name_or_path: folder, embedded name or Hub id.
        revision: branch, tag or commit on the Hub; only for a Hub id.

    Returns:
        A folder; its content is not checked yet.

    Raises:
        TypeError: not a string or path.
        ModelError: nothing found; the message says what was tried.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        kind = type(name_or_path).__name__
        raise TypeError(f"name_or_path is {kind}; it must be a string or a path")
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ModelError(f"model {show(name)} is neither a folder nor a name")
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_revision(revision, path)
        return path
    tried = [f"folder {path} ({'not a folder' if path.exists() else 'does not exist'})"]
    embedded = embedded_models()
    if isinstance(name_or_path, str):
        if name in embedded:
            _refuse_revision(revision, name)
            return _EMBEDDED / name
        tried.append(f"embedded models ({', '.join(embedded) or 'none'})")
        if _HUB_ID.fullmatch(name) and not path.exists():
            found = _from_hub(name, revision, tried)
            if found is not None:
                return found
    raise ModelError(f"model {show(name)} was not found; tried " + "; ".join(tried))


def _refuse_revision(revision: str | None, what: object) -> None:
    if revision is not None:
        raise ModelError(f"revision {revision!r} is only for Hub ids; {what} is not on the Hub")


def _from_hub(name: str, revision: str | None, tried: list[str]) -> Path | None:
    """Fetches a repository's four files; on failure adds the reason to `tried`."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        tried.append(f"Hub model {name} (needs pip install huggingface_hub)")
        return None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except LocalEntryNotFoundError:
        tried.append(
            f"Hub model {name} (the Hub is out of reach or HF_HUB_OFFLINE is set, "
            "and no local copy exists)"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        tried.append(f"Hub model {name} ({type(error).__name__}: {reason})")
    return None


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_tokenizer(
    text: str, vocab_size: int, where: str | os.PathLike[str] = TOKENIZER_FILE
) -> Tokenizer:
    """Builds the tokenizer of a `tokenizer.json` and checks that its ids fit the embedding table.

    Truncation and padding that the file may ask for are switched off here, once, before the object
    is shared: both change results silently, and changing them later is not safe between threads.

    Args:
        text: untrusted JSON of the `tokenizers` library.
        vocab_size: ids must be below it.
        where: named in errors.

    Raises:
        ModelError: it does not load, has no vocabulary, an id is out of range, or it cannot encode
            text outside its vocabulary.
    """
    _check_growth(text, where)
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        # Without an unknown token it would fail only at the first strange word: here is one.
        tokenizer.encode("\U00010380" * 200, add_special_tokens=False)
    except BaseException as error:  # a Rust panic derives from BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        fail(where, f"does not load as a tokenizer of the tokenizers library: {show(str(error))}")
    if not vocabulary:
        fail(where, "has an empty vocabulary")
    piece, largest = max(vocabulary.items(), key=lambda item: (item[1], item[0]))
    if largest >= vocab_size:
        fail(
            where,
            f"piece {show(piece)} has id {largest}; ids must be below vocab_size {vocab_size} "
            f"of {CONFIG_FILE}",
        )
    return tokenizer


def _check_growth(text: str, where: str | os.PathLike[str]) -> None:
    """Refuses a normalizer that makes of a short text one that no memory holds."""
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        return  # the library says what is wrong with it
    growth = 1
    for step in _steps(spec.get("normalizer") if isinstance(spec, dict) else None):
        if step.get("type") == "Replace":
            growth *= max(1, len(str(step.get("content"))))
        elif step.get("type") == "Prepend":
            growth *= 1 + len(str(step.get("prepend")))
        elif step.get("type") == "Precompiled":
            growth *= 4  # what NFKC makes of most characters at most
        if growth > _MAX_GROWTH:
            fail(where, f"has a normalizer that may lengthen a text more than {_MAX_GROWTH} times")


def _steps(normalizer: object) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer of the `tokenizers` library, sequences unfolded."""
    left = [normalizer]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            nested = step.get("normalizers")
            if isinstance(nested, list):
                left += nested
            yield step


def save_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    tokenizer_json: str,
    card: str,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a model folder, whole or not at all.

    The files are written and synced in a sibling folder, which is then renamed. With `overwrite`
    an existing folder is moved aside first and its other entries (a run record, say) are carried
    over; a kill between those renames leaves both versions beside the target, none half-written.

    Args:
        path: folder to make; its parent must exist.
        config: what to write as `config.json`.
        tensors: arrays by name, as `config.tensor_shapes()`; float32, the embedding table also
            float16; the matrices of a model of precision "int8" int8.
        tokenizer_json: text for `tokenizer.json`.
        card: text for `README.md`.
        overwrite: allow an existing target; an empty folder is always accepted.

    Returns:
        The folder's path.

    Raises:
        ModelError: anything that `load_folder` would refuse, before any file is written.
        FileExistsError: the target exists and `overwrite` is false.
        OSError: it cannot be written; the target is as it was.
    """
    from safetensors.numpy import save

    target = Path(path)
    exists = os.path.lexists(target)
    if exists and not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder")
    if exists and not overwrite and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder")
    checked = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    found = {name: (_dtype_name(value.dtype), value.shape) for name, value in checked.items()}
    _check_header(found, config, "tensors")
    for name, value in checked.items():
        _check_finite(name, value, "tensors")
    _check_int8(checked, config, "tensors")
    _check_crf(checked, config, "tensors")
    load_tokenizer(tokenizer_json, config.vocab_size)
    blobs = {
        CONFIG_FILE: config.to_json().encode(),
        WEIGHTS_FILE: save(checked),
        TOKENIZER_FILE: tokenizer_json.encode(),
        CARD_FILE: card.encode(),
    }
    # resolve(): "folder/.." or a symlinked target must still get a sibling on its own disk.
    target = target.resolve()
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        for name, blob in blobs.items():
            with open(fresh / name, "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
        fresh.chmod(0o777 & ~_umask())
        _sync_folder(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _sync_folder(target.parent)
    return Path(path)


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    # A name for the old folder that nobody holds; the rename needs it to be free or empty.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        target.rename(old)
    except BaseException:
        old.rmdir()
        raise
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    for entry in old.iterdir():
        if entry.name not in FILES:
            entry.rename(target / entry.name)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        needed = ", ".join(FILES[:3])
        fail(path, f"cannot be read ({error.strerror}); a model folder holds {needed}")
    if not stat.S_ISREG(mode):
        fail(path, "is not a regular file")


def _read_text(path: Path, limit: int) -> str:
    size = path.stat().st_size
    if size > limit:
        fail(path, f"has {size} bytes; at most {limit} are read")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        fail(path, f"is not UTF-8 (byte {error.start})")
    except OSError as error:
        fail(path, f"cannot be read ({error.strerror})")


def _dtype_name(dtype: np.dtype[Any]) -> str:
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int8): "I8"}
    return names.get(dtype, str(dtype))


def _check_header(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    config: ModelConfig,
    where: str | os.PathLike[str],
) -> None:
    shapes = config.tensor_shapes()
    if missing := [name for name in shapes if name not in found]:
        fail(where, f"tensor {missing[0]!r} is missing")
    if extra := sorted(set(found) - set(shapes)):
        fail(where, f"tensor {show(extra[0])} is unknown; allowed are {', '.join(shapes)}")
    for name, shape in shapes.items():
        dtype, actual = found[name]
        allowed: tuple[str, ...] = ("F32",)
        if config.precision == "int8" and name in QUANTIZED:
            allowed = ("I8",)
        elif name == "embedding.weight":
            allowed = ("F32", "F16")
        if dtype not in allowed:
            fail(where, f"tensor {name!r} has dtype {dtype}; allowed: {', '.join(allowed)}")
        if tuple(actual) != shape:
            fail(
                where,
                f"tensor {name!r} has shape {list(actual)}; {CONFIG_FILE} asks for {list(shape)}",
            )


def _check_finite(name: str, value: NDArray[Any], where: str | os.PathLike[str]) -> None:
    good = np.isfinite(value)
    if name in CRF_TENSORS:
        good |= np.isneginf(value)
    if not good.all():
        index = np.unravel_index(int(np.argmin(good)), value.shape)
        place = [int(i) for i in index]
        allowed = "finite or -inf" if name in CRF_TENSORS else "finite"
        fail(where, f"tensor {name!r} holds {value[index]} at {place}; values must be {allowed}")


def _check_int8(
    tensors: Mapping[str, NDArray[Any]], config: ModelConfig, where: str | os.PathLike[str]
) -> None:
    """Bytes that no kernel may multiply, and scales that no quantisation makes."""
    if config.precision != "int8":
        return
    for name in QUANTIZED:
        if name not in tensors:  # a layer that this student has not
            continue
        if not (tensors[scales_name(name)] > 0).all():
            fail(where, f"tensor {scales_name(name)!r} holds values that are not positive")
        if name in MULTIPLIED_AS_BYTES and not _core.valid_int8_rows(tensors[name]):
            fail(
                where,
                f"tensor {name!r} holds bytes whose sums could overflow; xdistil quantize makes "
                "bytes whose sums cannot",
            )


def _check_crf(
    tensors: Mapping[str, NDArray[Any]], config: ModelConfig, where: str | os.PathLike[str]
) -> None:
    """A CRF that forbids the all-`O` reading would leave some text without any reading.

    Where labels have no `O`, nothing may be forbidden.
    """
    if config.head != "crf":
        return
    if OUTSIDE not in config.labels:
        for name in CRF_TENSORS:
            if np.isneginf(tensors[name]).any():
                fail(where, f"tensor {name!r} forbids moves (-inf), which plain tags have none of")
        return
    tag = config.labels.index(OUTSIDE)
    for name in CRF_TENSORS:
        index = (tag,) * tensors[name].ndim
        if tensors[name][index] == -np.inf:
            fail(where, f"tensor {name!r} forbids 'O' (-inf at {list(index)}); it must be allowed")


def _read_tensors(path: Path, config: ModelConfig) -> Tensors:
    from safetensors import SafetensorError, safe_open

    tensors: Tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            # Header first: nothing is allocated for a tensor that does not belong here.
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()
            }
            _check_header(found, config, path)
            for name in config.tensor_shapes():
                value = file.get_tensor(name)
                _check_finite(name, value, path)
                dtype = np.int8 if value.dtype == np.int8 else np.float32
                tensors[name] = np.ascontiguousarray(value, dtype)
    except SafetensorError as error:
        fail(path, f"is corrupt or truncated: {show(str(error))}")
    except OSError as error:
        fail(path, f"cannot be read ({error})")
    _check_int8(tensors, config, path)
    _check_crf(tensors, config, path)
    return tensors
