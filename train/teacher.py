"""Teachers: fine-tuned Hugging Face token classifiers, and how they are asked for logits.

Models load from a local folder or by Hub id; nothing from such a model is ever executed
(``trust_remote_code`` is off; weights are safetensors, or pickles under torch's weights-only
unpickler).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers

from xdistil_fast.labels import validate_labels
from xdistil_fast.train.alignment import (
    Alignment,
    align,
    plain_tokenizer,
    windows_of,
    words_from_pieces,
)
from xdistil_fast.train.devices import fast_bf16, pick_device

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int], object]
Reduce = Callable[[FloatArray], FloatArray]
# transformers' own types leave attributes of a model unknown, so its objects go unchecked here.
Model: TypeAlias = Any
HFTokenizer: TypeAlias = Any
Self = TypeVar("Self", bound="Teacher")

_UNNAMED = re.compile(r"LABEL_\d+")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Their position table starts behind the padding index, which takes rows away.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"})
_UNSTABLE_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path"})
_FALLBACK_LENGTH = 512
_POOLER = "pooler."  # of a sequence classifier's head, though it lies with the encoder
# A thread; activations of larger batches leave the caches, narrow ones later (measured: MiniLM).
_CPU_TOKENS = {"float32": 512, "bfloat16": 2048}


class Teacher:
    """A token classifier with its tokeniser.

    Attributes:
        auto_model: class of transformers that loads it.
        task: of that class, in words.
        labels: label names by id, IOB2 or plain tags.
        tokenizer: the backend tokeniser, without truncation and padding.
        max_pieces: pieces that fit into one window of the model, special tokens not counted.
        precision: ``float32``, or ``bfloat16``: torch's autocast, for products of matrices.
    """

    precision = "float32"

    auto_model: ClassVar[Any] = transformers.AutoModelForTokenClassification
    task: ClassVar[str] = "token classification"

    def __init__(
        self,
        model: Model,
        hf_tokenizer: HFTokenizer,
        labels: Sequence[str],
        config_json: str = "{}",
    ) -> None:
        """Wrap a loaded model; use :meth:`from_pretrained` to load one."""
        self.model = model
        self.hf_tokenizer = hf_tokenizer
        self.labels = list(labels)
        self.tokenizer = backend_of(hf_tokenizer)
        self.prefix_ids, self.suffix_ids = _special_ids(self.tokenizer)
        self.max_pieces = max(
            1, _max_positions(model, hf_tokenizer) - len(self.prefix_ids) - len(self.suffix_ids)
        )
        self.pad_id = int(getattr(hf_tokenizer, "pad_token_id", None) or 0)
        self._config_json = config_json
        self._digest: str | None = None

    @classmethod
    def from_pretrained(
        cls: type[Self], path: Path | str, device: str = "auto", precision: str = "float32"
    ) -> Self:
        """Load a fine-tuned teacher.

        Args:
            path: local folder or Hub id.
            device: ``auto`` (a CUDA device where torch has one), ``cpu``, ``cuda``, ...
            precision: it is asked in: ``float32``, ``bfloat16``, or ``auto``, which is bfloat16
                where that is done in hardware.

        Raises:
            ValueError: nothing there; no fast tokeniser; weights that are missing, of another
                shape than ``config.json`` says or not finite; labels that are of no scheme.
        """
        name = resolve_name(path)
        with quiet_transformers():
            config, config_json = load_config(name)
            labels = cls.labels_of_config(name, config)
            hf_tokenizer = load_tokenizer(name)
            model, info = _load_model(cls.auto_model, name, config, ignore_mismatched=False)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{name}: weights lack {_few(missing)}; a teacher must be fine-tuned for "
                f"{cls.task} ('xdistil teacher' does that)"
            )
        check_finite(name, model)
        check_vocabulary(name, model, hf_tokenizer)
        model.eval().to(pick_device(device))
        teacher = cls(model, hf_tokenizer, labels, config_json)
        if precision == "bfloat16" or (precision == "auto" and fast_bf16(teacher.device)):
            teacher.precision = "bfloat16"
        return teacher

    @classmethod
    def labels_of_config(cls, name: str, config: transformers.PretrainedConfig) -> list[str]:
        """Label names by id.

        Raises:
            ValueError: they are not of the kind that this teacher has.
        """
        labels = names_of_config(config)
        try:
            if labels and all(map(_UNNAMED.fullmatch, labels)):
                raise ValueError(f"{labels[0]!r} is what transformers calls a label without a name")
            validate_labels(labels)
        except ValueError as error:
            raise ValueError(
                f"{name}: labels are not IOB2, nor plain tags ({error}); 'xdistil teacher' makes "
                "such a model"
            ) from None
        return labels

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's output."""
        return int(self.model.config.hidden_size)

    @property
    def parameters(self) -> int:
        """Number of parameters, embeddings and head included."""
        return sum(p.numel() for p in self.model.parameters())

    def digest(self) -> str:
        """SHA-256 over weights, tokeniser and configuration, in hex.

        The same on every machine; versions and paths noted in ``config.json`` do not count.
        """
        if self._digest is None:
            self._digest = weights_digest(
                self.model, self._config_json, self.tokenizer.to_str(), *self.labels
            )
        return self._digest

    def word_piece_embeddings(self) -> FloatArray:
        """The table of word-piece embeddings, [V, D], a copy."""
        weight = self.model.get_input_embeddings().weight
        return np.array(weight.detach().to("cpu", torch.float32).numpy(), dtype=np.float32)

    def logits(
        self,
        sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]],
        batch_tokens: int = 8192,
        progress: Progress | None = None,
    ) -> list[FloatArray]:
        """Logits of every piece.

        [CLS] and [SEP] (or what the model has for them) are added and stripped again. Sequences
        longer than the model takes are read in windows that overlap by a quarter; each piece's
        logits come from the window in which it lies farther from the border.

        Args:
            sequences: piece ids of each sequence, T_i of them; may be empty.
            batch_tokens: upper bound on the tokens of a padded batch; a longer sequence makes
                a batch by itself. A CPU takes 512 a thread at most (2,048 in bfloat16), which is
                faster there.
            progress: called with the number of sequences finished since the last call.

        Returns:
            [T_i, C] for each sequence, in the order given.

        Raises:
            ValueError: ``batch_tokens`` below 1, or a piece id outside of the embedding table.
        """
        return self._outputs(sequences, batch_tokens, progress, None)[0]

    def outputs(
        self,
        sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]],
        batch_tokens: int = 8192,
        progress: Progress | None = None,
        *,
        layer: int,
        reduce: Reduce | None = None,
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """Logits and hidden states of every piece, in one pass.

        Args:
            sequences: as for :meth:`logits`.
            batch_tokens: as for :meth:`logits`.
            progress: as for :meth:`logits`.
            layer: encoder layer, as :meth:`resolve_layer` gives it.
            reduce: turns states [n, D] into what is kept of them, [n, R], row by row; states are
                kept as they are without it.

        Returns:
            [T_i, C] and [T_i, R] for each sequence, in the order given.

        Raises:
            ValueError: as :meth:`logits`.
        """
        return self._outputs(sequences, batch_tokens, progress, (layer, reduce))

    def resolve_layer(self, layer: int | None) -> int:
        """Number of an encoder layer, from 1.

        Args:
            layer: from 1, or from the end where negative; None for the paper's 7 of 12, or what
                lies in its place in a model of another depth.

        Raises:
            ValueError: the model has no such layer.
        """
        depth = int(self.model.config.num_hidden_layers)
        if layer is None:
            return math.ceil(7 * depth / 12)
        if not 1 <= abs(layer) <= depth:
            raise ValueError(
                f"teacher_layer is {layer}; the teacher has {depth} layers; allowed: 1 to {depth}, "
                f"or -{depth} to -1 from the end"
            )
        return layer if layer > 0 else depth + 1 + layer

    def _outputs(
        self,
        sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]],
        batch_tokens: int,
        progress: Progress | None,
        hidden: tuple[int, Reduce | None] | None,
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; allowed: 1 or more")
        arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        self._check_ids(arrays)
        layer, reduce = hidden or (None, None)
        results = [np.empty((len(ids), len(self.labels)), dtype=np.float32) for ids in arrays]
        states: list[FloatArray] = []
        pending = [0] * len(arrays)
        windows: list[tuple[int, int, int, int, int]] = []
        for index, ids in enumerate(arrays):
            for window in windows_of(len(ids), self.max_pieces):
                windows.append((index, *window))
                pending[index] += 1
        if progress is not None and (empty := pending.count(0)):
            progress(empty)
        windows.sort(key=lambda w: w[1] - w[2])  # longest first: too big a batch fails at once
        batch_tokens = self.batch_limit(batch_tokens)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches(windows, batch_tokens):
                inputs = [arrays[i][a:b] for i, a, b, _, _ in batch]
                outputs, inner = self._forward(inputs, layer)
                if reduce is not None:
                    inner = [reduce(rows) for rows in inner]
                if inner and not states:
                    width = inner[0].shape[1]
                    states = [np.empty((len(ids), width), dtype=np.float32) for ids in arrays]
                done = 0
                for row, (i, start, _, keep_from, keep_to) in enumerate(batch):
                    kept = slice(keep_from - start, keep_to - start)
                    results[i][keep_from:keep_to] = outputs[row][kept]
                    if inner:
                        states[i][keep_from:keep_to] = inner[row][kept]
                    pending[i] -= 1
                    done += pending[i] == 0
                if progress is not None and done:
                    progress(done)
        finally:
            self.model.train(was_training)
        return results, states

    def batch_limit(self, batch_tokens: int) -> int:
        """Tokens of a padded batch, where the device is slower with more of them."""
        if self.device.type != "cpu":
            return batch_tokens
        return min(batch_tokens, _CPU_TOKENS[self.precision] * torch.get_num_threads())

    def tag(self, alignment: Alignment, progress: Progress | None = None) -> list[list[str]]:
        """Most probable tag of every word of aligned sentences (that of its first piece)."""
        sequences = [alignment.pieces(i) for i in range(len(alignment))]
        logits = self.logits(sequences, progress=progress)
        best = [part.argmax(axis=1) for part in logits] or [np.empty(0, dtype=np.int64)]
        return words_from_pieces(alignment, np.concatenate(best), self.labels)

    def tag_words(
        self, sentences: Sequence[Sequence[str]], progress: Progress | None = None
    ) -> list[list[str]]:
        """Most probable tag of every word; see :func:`~.alignment.words_from_pieces`."""
        if not sentences:
            return []
        return self.tag(align(self.tokenizer, sentences), progress)

    def _check_ids(self, arrays: Sequence[npt.NDArray[np.int64]]) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        for index, ids in enumerate(arrays):
            if ids.ndim != 1:
                raise ValueError(f"sequences[{index}] has {ids.ndim} dimensions; allowed: 1")
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
                wrong = int(ids.min() if ids.min() < 0 else ids.max())
                raise ValueError(
                    f"sequences[{index}] holds piece id {wrong}; allowed: 0 to {rows - 1}"
                )

    def _batches(
        self, windows: Sequence[tuple[int, int, int, int, int]], batch_tokens: int
    ) -> Iterator[list[tuple[int, int, int, int, int]]]:
        batch: list[tuple[int, int, int, int, int]] = []
        special = len(self.prefix_ids) + len(self.suffix_ids)
        width = 0
        for window in windows:
            if batch and (len(batch) + 1) * width > batch_tokens:
                yield batch
                batch = []
            if not batch:
                width = window[2] - window[1] + special
            batch.append(window)
        if batch:
            yield batch

    def _forward(
        self, pieces: Sequence[npt.NDArray[np.int64]], layer: int | None
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """Logits of a padded batch, and the states of a layer where one is asked for."""
        found = self.forward(pieces, layer)
        begin = len(self.prefix_ids)

        def rows(tensor: torch.Tensor) -> list[FloatArray]:
            array = tensor.to("cpu", torch.float32).numpy()
            return [array[row, begin : begin + len(ids)] for row, ids in enumerate(pieces)]

        if layer is None:
            return rows(found.logits), []
        # The embeddings come first, before the output of layer 1.
        return rows(found.logits), rows(found.hidden_states[layer])

    def forward(self, pieces: Sequence[npt.NDArray[np.integer]], layer: int | None) -> Any:
        """What the model gives for a padded batch, with hidden states where a layer is named."""
        input_ids, mask = self.collate(pieces)
        autocast = torch.autocast(self.device.type, torch.bfloat16, self.precision == "bfloat16")
        with torch.inference_mode(), autocast:
            return self.model(
                input_ids=torch.from_numpy(input_ids).to(self.device),
                attention_mask=torch.from_numpy(mask).to(self.device),
                output_hidden_states=layer is not None,
            )

    def collate(
        self, pieces: Sequence[npt.NDArray[np.integer]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pad sequences with their special tokens: input ids and attention mask, [B, L]."""
        begin = len(self.prefix_ids)
        special = begin + len(self.suffix_ids)
        width = max(map(len, pieces)) + special
        input_ids = np.full((len(pieces), width), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, ids in enumerate(pieces):
            input_ids[row, :begin] = self.prefix_ids
            input_ids[row, begin : begin + len(ids)] = ids
            input_ids[row, begin + len(ids) : len(ids) + special] = self.suffix_ids
            mask[row, : len(ids) + special] = 1
        return input_ids, mask


def resolve_name(path: Path | str) -> str:
    """Check that ``path`` is a model folder, or could be a Hub id; returns it as a string.

    Raises:
        ValueError: neither of the two.
    """
    name = str(path)
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name}: no config.json in this folder; not a Hugging Face model")
        return name
    if folder.exists():
        raise ValueError(f"{name} is a file; a model is a folder or a Hub id")
    if isinstance(path, Path) or not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name}: no such folder, and not a Hub id like 'owner/name'")
    return name


def load_config(name: str) -> tuple[transformers.PretrainedConfig, str]:
    """Configuration of a model: as transformers sees it, and ``config.json`` made stable.

    The second is sorted JSON without the keys that tell versions and paths.

    Raises:
        ValueError: it is missing, damaged or of an unknown kind of model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        file = transformers.utils.hub.cached_file(name, "config.json")
        raw = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name}: cannot load the model's configuration ({_line(error)})"
        ) from None
    kept = {k: v for k, v in raw.items() if k not in _UNSTABLE_CONFIG_KEYS}
    return config, json.dumps(kept, sort_keys=True)


def load_tokenizer(name: str) -> HFTokenizer:
    """Fast tokeniser of a model, without truncation and padding.

    Byte-level ones are told to put a space before every word, as words come one by one.

    Raises:
        ValueError: there is none, or an empty or slow one.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, use_fast=True, trust_remote_code=False, add_prefix_space=True
        )
    except Exception as error:  # readers of foreign files raise whatever they like
        raise ValueError(f"{name}: cannot load a tokeniser ({_line(error)})") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(
            f"{name}: {type(tokenizer).__name__} is not a fast tokeniser; a model with a "
            "tokenizer.json is needed"
        )
    if isinstance(backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel):
        # Not every class of transformers hands the wish above on.
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=True, use_regex=backend.pre_tokenizer.use_regex
        )
    # Where the files are missing, transformers makes up a tokeniser of special tokens only.
    if backend.get_vocab_size(with_added_tokens=True) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"{name}: cannot load a tokeniser (no vocabulary; is the file missing?)")
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def backend_of(hf_tokenizer: HFTokenizer) -> tokenizers.Tokenizer:
    """Own copy of the backend of a fast tokeniser, without truncation and padding."""
    return plain_tokenizer(hf_tokenizer.backend_tokenizer)


def _load_model(
    auto_model: Any, name: str, config: transformers.PretrainedConfig, *, ignore_mismatched: bool
) -> tuple[Model, dict[str, Any]]:
    try:
        model, info = auto_model.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=ignore_mismatched,
            output_loading_info=True,
        )
    except Exception as error:  # damaged weights raise many kinds of errors
        raise ValueError(f"{name}: cannot load the weights ({_line(error)})") from None
    return model, info


def load_base(name: str, labels: Sequence[str], kind: type[Teacher] = Teacher) -> Model:
    """Load a base encoder with a head for ``labels``, of the kind that a class of teachers has.

    The head is freshly drawn from torch's generator, unless the base has one for the very same
    labels.

    Raises:
        ValueError: weights that are missing (outside of the head), misshapen or not finite.
    """
    config, _ = load_config(name)
    had = getattr(config, "id2label", None) or {}
    same_head = [had.get(i) for i in range(len(had))] == list(labels)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    model, info = _load_model(kind.auto_model, name, config, ignore_mismatched=True)
    body = model.base_model_prefix + "."
    wrong = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    bad = sorted(
        key
        for key in wrong | set(info["missing_keys"])
        if key.startswith(body) and not key.startswith(body + _POOLER)
    )
    if bad:
        raise ValueError(f"{name}: weights of the encoder are missing or misshapen: {_few(bad)}")
    if not same_head:
        deviation = float(getattr(config, "initializer_range", 0.02))
        for module_name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not module_name.startswith(body):
                torch.nn.init.normal_(module.weight, std=deviation)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
    check_finite(name, model)
    return model


def check_finite(name: str, model: torch.nn.Module) -> None:
    """Refuse weights with NaN or infinity (ValueError)."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: weight {key!r} holds NaN or infinity")


def check_vocabulary(name: str, model: Model, hf_tokenizer: HFTokenizer) -> None:
    """Refuse a tokeniser with more pieces than the model has embeddings (ValueError)."""
    rows = model.get_input_embeddings().weight.shape[0]
    size = hf_tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if size > rows:
        raise ValueError(
            f"{name}: the tokeniser has {size} pieces but the model only {rows} embeddings"
        )


def weights_digest(model: torch.nn.Module, *texts: str) -> str:
    """SHA-256 over a model's state (names, types, shapes, bytes) and texts, in hex."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for text in texts:
        encoded = text.encode()
        digest.update(f"{len(encoded)}\n".encode())
        digest.update(encoded)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing load reports and bars; its settings come back after."""
    logging: Any = transformers.utils.logging
    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def names_of_config(config: transformers.PretrainedConfig) -> list[str]:
    """Label names by id, empty where one is missing."""
    names = getattr(config, "id2label", None) or {}
    return [str(names.get(i, "")) for i in range(len(names))]


def _special_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokeniser's post-processor puts before and behind one sequence."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    content = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    if not content:
        return encoding.ids, []
    return encoding.ids[: content[0]], encoding.ids[content[-1] + 1 :]


def _max_positions(model: Model, hf_tokenizer: HFTokenizer) -> int:
    """Tokens that one input may have, special tokens included."""
    config = model.config
    positions = int(getattr(config, "max_position_embeddings", 0) or _FALLBACK_LENGTH)
    if config.model_type in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id) + 1
    return max(1, min(positions, int(min(hf_tokenizer.model_max_length, 10**9))))


def _few(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def _line(error: BaseException) -> str:
    """First line of an error's message, for one-line messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
