"""What `Tagger` and `Classifier` share: loading, pickling, reading text in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from tokenizers import Tokenizer

from xdistil_fast.cuda_student import device_number, student_on
from xdistil_fast.model_config import TEXT_CLASSIFICATION, TOKEN_CLASSIFICATION
from xdistil_fast.model_io import (
    ModelConfig,
    ModelError,
    Tensors,
    count_parameters,
    load_folder,
    load_tokenizer,
    resolve_model,
)
from xdistil_fast.tokenization import Encoded, TextEncoder

# A word piece is about four characters long in most languages; only the size of a batch hangs on
# it, and the kernels take a batch in parts anyway.
_CHARS_PER_PIECE = 4
TRUNCATIONS = ("window", "error")
# Which class runs which task, and what that one makes.
_CLASSES = {
    TOKEN_CLASSIFICATION: ("Tagger", "a tagger of words"),
    TEXT_CLASSIFICATION: ("Classifier", "a classifier of texts"),
}
Self = TypeVar("Self", bound="TextModel")


class TextModel:
    """A student with its tokenizer; see `Tagger` and `Classifier`.

    Args:
        config: of the model.
        tensors: arrays as `config.tensor_shapes()`.
        tokenizer: its ids below `config.vocab_size`; must not be changed afterwards.
        threads: kernel threads; 0 is every core the process may use, 1 stays in the caller's.
        precision: "float32", "bfloat16" or "int8"; None is what the model is stored in.
        max_memory: bytes that the input table may take; None is 256 MiB (see `Student`).
        device: "cpu", "cuda" or "cuda:N": where scores are computed (see `cuda_student`).
        name: shown by `repr`.
        digest: SHA-256 of the weights, "" if not known.

    Raises:
        ModelError: a model of another task.
        TypeError, ValueError: from `Student`.
    """

    task: ClassVar[str]

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        tokenizer: Tokenizer,
        *,
        threads: int = 0,
        precision: str | None = None,
        max_memory: int | None = None,
        device: str = "cpu",
        name: str = "",
        digest: str = "",
    ) -> None:
        if config.task != self.task:
            right, kind = _CLASSES[config.task]
            raise ModelError(
                f"{name or 'this model'} is {kind} (task {config.task!r}), which "
                f"xdistil_fast.{right} runs; {type(self).__name__} is for {self.task!r}"
            )
        self.config = config
        self.name = name
        self.digest = digest
        self._tensors = tensors
        self._tokenizer = tokenizer
        self._student = student_on(device, config, tensors, threads, precision, max_memory)
        self._encoder = TextEncoder(tokenizer, threads)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name_or_path: str | os.PathLike[str],
        threads: int = 0,
        revision: str | None = None,
        *,
        precision: str | None = None,
        max_memory: int | None = None,
        device: str = "cpu",
    ) -> Self:
        """Loads a model.

        Args:
            name_or_path: a model folder, the name of an embedded model ("en-ner"), or a Hub id
                ("owner/name"); looked for in that order.
            threads: kernel threads; 0 is every core the process may use.
            revision: branch, tag or commit of a Hub id.
            precision: "float32", "bfloat16" or "int8"; None is what the model is stored in. "int8"
                is the fastest and changes few results; `xdistil quantize` measures how few.
            max_memory: bytes that the input table may take; None is 256 MiB. Changes speed and
                memory, never a result.
            device: "cpu", or "cuda" or "cuda:N" where the extension for GPUs was built; results
                are close to the CPU's, not its bits.

        Raises:
            ModelError: (a ValueError) not found, not a model this version can run, or one of
                another task.
            TypeError: an argument of another type.
            ValueError: an argument out of its range.
            RuntimeError: there is no GPU, driver or extension for `device`; or it failed.
            MemoryError: the GPU's memory does not suffice.
        """
        device_number(device)  # before anything is fetched or read
        folder = load_folder(resolve_model(name_or_path, revision))
        return cls(
            folder.config,
            folder.tensors,
            folder.tokenizer,
            threads=threads,
            precision=precision,
            max_memory=max_memory,
            device=device,
            name=os.fspath(name_or_path),
            digest=folder.digest,
        )

    @property
    def labels(self) -> list[str]:
        """Labels by id: IOB2 of a tagger, class names of a classifier."""
        return list(self.config.labels)

    @property
    def threads(self) -> int:
        """Kernel threads; 0 is every core the process may use."""
        return self._student.threads

    @property
    def precision(self) -> str:
        """What the kernels compute in: "float32", "bfloat16" or "int8"."""
        return self._student.precision

    @property
    def device(self) -> str:
        """Where scores are computed: "cpu" or "cuda:N"."""
        return self._student.device

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return count_parameters(self._tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by value, so that a worker on another machine needs no folder."""
        options = {
            "threads": self.threads,
            "precision": self.precision,
            "max_memory": self._student.max_memory,
            "device": self.device,
            "name": self.name,
            "digest": self.digest,
        }
        return _rebuild, (
            type(self), self.config, self._tensors, self._tokenizer.to_str(), options
        )  # fmt: skip

    def _check_lengths(self, encoded: Encoded, offset: int) -> None:
        """Refuses texts longer than a window; `offset` is added to their index."""
        lengths = encoded.cu_pieces[1:] - encoded.cu_pieces[:-1]
        for index in (lengths > self.config.window).nonzero()[0][:1].tolist():
            raise ValueError(
                f"texts[{offset + index}] has {lengths[index]} pieces; truncation='error' allows "
                f"at most {self.config.window} (truncation='window' reads any length)"
            )


def _rebuild(
    kind: type[TextModel],
    config: ModelConfig,
    tensors: Tensors,
    tokenizer_json: str,
    options: Mapping[str, Any],
) -> TextModel:
    return kind(config, tensors, load_tokenizer(tokenizer_json, config.vocab_size), **options)


def check_truncation(truncation: object) -> None:
    """Refuses all but `TRUNCATIONS` (ValueError)."""
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation is {truncation!r}; allowed: 'window', 'error'")


def check_texts(texts: object) -> None:
    """Refuses anything but a list or tuple of strings (TypeError)."""
    if not isinstance(texts, (list, tuple)):
        raise TypeError(
            f"texts is {type(texts).__name__}; it must be a string or a list of strings "
            "(use pipe for other iterables)"
        )
    for index, text in enumerate(texts):
        _check_text(text, index)


def check_stream(texts: object, batch_tokens: object, truncation: object) -> None:
    """Refuses bad arguments of a `pipe` before its first text (TypeError, ValueError)."""
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        kind = type(texts).__name__
        raise TypeError(f"texts is {kind}; pipe takes an iterable of strings")
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int):
        raise TypeError(f"batch_tokens is {batch_tokens!r}; it must be an int")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    check_truncation(truncation)


def batches(texts: Iterable[str], batch_tokens: int) -> Iterator[tuple[list[str], int]]:
    """Texts in lists of about `batch_tokens` pieces, each with the index of its first text.

    Raises:
        TypeError: something that is no string, when its turn comes.
    """
    batch: list[str] = []
    size = done = 0
    for index, text in enumerate(texts):
        _check_text(text, index)
        batch.append(text)
        size += 1 + len(text) // _CHARS_PER_PIECE
        if size >= batch_tokens:
            yield batch, done
            done += len(batch)
            batch, size = [], 0
    if batch:
        yield batch, done


def _check_text(text: object, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] is {type(text).__name__}; it must be a string")
