"""Fine-tuning a Hugging Face encoder into a teacher.

The work goes on in ``OUT.part`` beside the output folder ``OUT``:

    run_key.json       what this run is: settings, labels, digests of data and base model
    epoch-N/           after N epochs: weights, optimiser state, the best weights so far
    finished/          the model folder, renamed to OUT when it is complete

Everything random is drawn from the seed and the number of the epoch. So a run that was killed
and started again ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from tqdm import tqdm

from xdistil_fast.labels import make_labels, scheme_of
from xdistil_fast.scoring import score
from xdistil_fast.train import checkpoint, runs
from xdistil_fast.train.alignment import (
    IGNORED,
    Alignment,
    align,
    piece_targets,
    split_points,
    tag_ids,
)
from xdistil_fast.train.corpora import Corpus, labelling_of
from xdistil_fast.train.devices import fast_bf16, pick_device
from xdistil_fast.train.languages import (
    check_languages,
    chosen_by,
    language_report,
    languages_of,
    score_languages,
)
from xdistil_fast.train.learning_rate import rate_factor
from xdistil_fast.train.teacher import (
    Teacher,
    check_vocabulary,
    load_base,
    load_tokenizer,
    quiet_transformers,
    resolve_name,
    weights_digest,
)

_POOL = 50  # batches whose sentences are sorted together by length


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """Settings of a fine-tuning run.

    Attributes:
        epochs: passes over the training sentences.
        learning_rate: peak of a linear warm-up and decay to 0.
        batch_size: sentences a step.
        seed: of everything random.
        max_length: pieces a training sequence may have, special tokens not counted; longer
            sentences are split at word borders. Never more than the model takes.
        weight_decay: AdamW's, for matrices only.
        warmup: share of all steps in which the rate rises.
        clip: bound on the norm of the gradient.
        pieces: train ``all`` pieces, or only the ``first`` of each word.
        device: ``auto``, ``cpu``, ``cuda``, ...
    """

    epochs: int = 4
    learning_rate: float = 2e-4
    batch_size: int = 32
    seed: int = 0
    max_length: int = 256
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    pieces: Literal["all", "first"] = "all"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("max_length", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value < 2**31:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {low}")
        for name, high in (
            ("learning_rate", 1.0),
            ("weight_decay", 1.0),
            ("warmup", 1.0),
            ("clip", 1e9),
        ):
            value = getattr(self, name)
            zero_ok = name in ("weight_decay", "warmup")
            if not (0 <= value <= high) or (value == 0 and not zero_ok):
                above = "0" if zero_ok else "above 0"
                raise ValueError(f"{name} is {value!r}; allowed: {above} to {high:g}")
        if self.pieces not in ("all", "first"):
            raise ValueError(f"pieces is {self.pieces!r}; allowed: 'all', 'first'")


@dataclass(slots=True)
class _State:
    """Progress of a run; stored as ``state.json`` of each checkpoint."""

    epoch: int
    best_epoch: int
    best_scores: dict[str, Any]
    history: list[dict[str, Any]]
    seconds: float


def fine_tune(
    base: Path | str,
    train: Sequence[Any],
    dev: Sequence[Any],
    out: Path | str,
    settings: TeacherSettings | None = None,
    *,
    command: Sequence[str] = (),
    progress: bool = True,
    on_epoch: Callable[[int, Any], None] | None = None,
    run_class: type[TrainingRun] | None = None,
) -> dict[str, Any]:
    """Fine-tune an encoder for token classification; keep the epoch that is best on ``dev``.

    Args:
        base: local folder or Hub id of a Hugging Face encoder.
        train: labelled corpora to learn from; their entity types make the labels.
        dev: labelled corpora that choose the epoch, by strict word-level F1; where they have
            languages, by its mean over these.
        out: folder to make. One made by the same run is left as it is.
        settings: see :class:`TeacherSettings`.
        command: argv for ``run.json``.
        progress: show a bar and one line an epoch on standard error.
        on_epoch: called after the checkpoint of an epoch is on disk.
        run_class: of another task; see :mod:`~xdistil_fast.train.document_teacher`.

    Returns:
        The content of ``run.json``.

    Raises:
        ValueError: no entity in ``train``; types in ``dev`` that ``train`` lacks; a base model
            that does not fit; ``out`` or its ``.part`` holding something else; loss not finite.
        OSError: a full disk, say. The same command goes on from the last epoch.
        BlockingIOError: another process is making this output.
    """
    settings = settings or TeacherSettings()
    run_class = run_class or TrainingRun
    out = Path(out)
    name = resolve_name(base)
    labels = run_class.labels_of(train, dev)
    device = pick_device(settings.device)
    checkpoint.check_output(out)

    torch.manual_seed(settings.seed)
    with quiet_transformers():
        hf_tokenizer = load_tokenizer(name)
        model = load_base(name, labels, run_class.kind)
    check_vocabulary(name, model, hf_tokenizer)
    teacher = run_class.kind(model, hf_tokenizer, labels)
    key: dict[str, Any] = {
        "settings": asdict(settings),
        "labels": labels,
        "base": weights_digest(model, teacher.tokenizer.to_str()),
        "train": [_identity(c) for c in train],
        "dev": [_identity(c) for c in dev],
    }
    part = out.with_name(out.name + ".part")
    finished = checkpoint.finished_before(out, key)
    if finished is not None:
        if checkpoint.key_of(part) == key:  # killed between the last two steps
            shutil.rmtree(part)
        return finished
    model.to(device)
    run = run_class(teacher, settings, part, train, dev, progress)
    checkpoint.open_part(part, key)
    with checkpoint.alone(part):
        run.go(on_epoch)
        record = _finish(run, out, name, key, command)
        shutil.rmtree(part)
    return record


def adamw(
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.AdamW:
    """AdamW that decays matrices but no biases and norms."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        fused=device.type in ("cpu", "cuda"),
    )


def epoch_batches(
    lengths: npt.NDArray[np.integer], batch_size: int, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Indices of the sequences of each batch of one epoch.

    Sequences are shuffled, sorted by length within pools of 50 batches, cut into batches, and
    the batches are shuffled: hardly any padding, and still another order every epoch.

    Args:
        lengths: [N] pieces of each sequence.
        batch_size: sequences a batch; one batch may have fewer.
        seed: of the run.
        epoch: number of the epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), _POOL * batch_size):
        pool = order[start : start + _POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches.extend(pool[i : i + batch_size] for i in range(0, len(pool), batch_size))
    return [batches[i] for i in generator.permutation(len(batches))]


class TrainingRun:
    """One training run: data on pieces, optimiser, checkpoints.

    Attributes:
        kind: class of the teacher.
        metric: figure of the scores on dev that chooses the epoch.
        metric_name: what it is called.
    """

    kind: ClassVar[type[Teacher]] = Teacher
    metric: ClassVar[str] = "f1"
    metric_name: ClassVar[str] = "F1"

    def __init__(
        self,
        teacher: Teacher,
        settings: TeacherSettings,
        part: Path,
        train: Sequence[Any],
        dev: Sequence[Any],
        progress: bool,
    ) -> None:
        self.teacher, self.settings, self.part, self.progress = teacher, settings, part, progress
        self.model = teacher.model
        self.device = teacher.device
        self.data = [
            *(corpus.describe("train") for corpus in train),
            *(corpus.describe("dev") for corpus in dev),
        ]
        self.max_length = min(settings.max_length, teacher.max_pieces)
        self.runs: list[tuple[int, int]] = []
        self._prepare(train, dev)
        if not self.runs:
            raise ValueError("train: the tokeniser makes no piece of any of these words")
        self.lengths = np.array([stop - start for start, stop in self.runs], dtype=np.int64)
        self.steps_per_epoch = math.ceil(len(self.runs) / settings.batch_size)
        self.names = dict(self.model.named_parameters())
        self.optimizer = adamw(
            self.names.values(), settings.learning_rate, settings.weight_decay, self.device
        )
        if fast_bf16(self.device):  # dev is then tagged as the model is trained, and faster
            teacher.precision = "bfloat16"
        self.state = _State(0, 0, {}, [], 0.0)
        self.best: dict[str, torch.Tensor] = {}

    @staticmethod
    def labels_of(train: Sequence[Any], dev: Sequence[Any]) -> list[str]:
        """Labels of the teacher, from the corpora (ValueError where these do not fit)."""
        return _labels(train, dev)

    def _prepare(self, train: Sequence[Any], dev: Sequence[Any]) -> None:
        """Cut the corpora into runs of pieces with their targets."""
        words, tags = _words_and_tags(train)
        alignment = align(self.teacher.tokenizer, words)
        self.ids = alignment.ids.astype(np.int64)
        self.targets = piece_targets(
            alignment, tag_ids(tags, self.teacher.labels), self.teacher.labels, self.settings.pieces
        )
        self.runs = [
            run
            for i in range(len(alignment))
            for run in split_points(alignment, i, self.max_length)
        ]
        dev_words, self.dev_tags = _words_and_tags(dev)
        self.dev_languages = languages_of(dev)
        self.dev_alignment: Alignment = align(self.teacher.tokenizer, dev_words)

    def go(self, on_epoch: Callable[[int, Any], None] | None) -> None:
        """Train the epochs that are left, with a checkpoint after each."""
        self._restore()
        for epoch in range(self.state.epoch + 1, self.settings.epochs + 1):
            started = time.perf_counter()
            loss = self._epoch(epoch)
            value, scores, best_scores = self._evaluate()
            best = max((h[f"dev_{self.metric}"] for h in self.state.history), default=-1.0)
            if value > best:
                self.state.best_epoch = epoch
                self.state.best_scores = best_scores
                self.best = {
                    k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()
                }
            seconds = time.perf_counter() - started
            self.state.epoch = epoch
            self.state.seconds += seconds
            self.state.history.append(
                {
                    "epoch": epoch,
                    "loss": loss,
                    f"dev_{self.metric}": value,
                    "seconds": round(seconds, 3),
                }
            )
            self._save()
            self._say(
                f"epoch {epoch}/{self.settings.epochs}: loss {loss:.4f}, "
                f"dev {self.metric_name} {value:.2f}, {seconds:.0f} s"
            )
            if on_epoch is not None:
                on_epoch(epoch, scores)
        self.model.load_state_dict(self.best)

    def _epoch(self, epoch: int) -> float:
        """One pass; returns the mean loss of its steps."""
        settings = self.settings
        steps = self.steps_per_epoch * settings.epochs
        done = self.steps_per_epoch * (epoch - 1)
        # Dropout depends on seed and epoch only, so that a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0]))
        self.model.train()
        total = 0.0
        batches = epoch_batches(self.lengths, settings.batch_size, settings.seed, epoch)
        bar = tqdm(
            batches,
            desc=f"epoch {epoch}/{settings.epochs}",
            unit="batch",
            disable=None if self.progress else True,
            dynamic_ncols=True,
            leave=False,
        )
        for number, batch in enumerate(bar):
            rate = settings.learning_rate * rate_factor(done + number, steps, settings.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._step([self.runs[i] for i in batch])
            total += loss
            bar.set_postfix(loss=f"{total / (number + 1):.4f}", refresh=False)
        return total / len(batches)

    def _step(self, runs: Sequence[tuple[int, int]]) -> float:
        input_ids, mask = self.teacher.collate([self.ids[a:b] for a, b in runs])
        targets = self._targets(runs, input_ids)
        self.optimizer.zero_grad(set_to_none=True)
        bfloat16 = self.teacher.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.model(
                input_ids=torch.from_numpy(input_ids).to(self.device),
                attention_mask=torch.from_numpy(mask).to(self.device),
            ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().view(-1, logits.shape[-1]),
            torch.from_numpy(targets).to(self.device).view(-1),
            ignore_index=IGNORED,
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss became {value}; a lower learning rate than "
                f"{self.settings.learning_rate:g} may help"
            )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.names.values(), self.settings.clip)
        self.optimizer.step()
        return value

    def _targets(
        self, runs: Sequence[tuple[int, int]], input_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Right label of each row of the logits, or IGNORED."""
        targets = np.full_like(input_ids, IGNORED)
        begin = len(self.teacher.prefix_ids)
        for row, (start, stop) in enumerate(runs):
            targets[row, begin : begin + stop - start] = self.targets[start:stop]
        return targets

    def _evaluate(self) -> tuple[float, Any, dict[str, Any]]:
        """What the epoch is chosen by, scores on dev, and the same as JSON."""
        with tqdm(
            total=len(self.dev_alignment),
            desc="dev",
            unit="sentence",
            disable=None if self.progress else True,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            found = self.teacher.tag(self.dev_alignment, bar.update)
        scheme = scheme_of(self.teacher.labels)
        scores = score(self.dev_tags, found, scheme)
        languages = score_languages(self.dev_languages, self.dev_tags, found, scheme)
        record = scores.to_dict() | (language_report(languages) if languages else {})
        return chosen_by(scores, languages), scores, record

    def _save(self) -> None:
        """Checkpoint of this epoch, written beside and renamed; then the older one goes."""
        epoch = self.state.epoch
        fresh = self.part / f"epoch-{epoch}.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            safetensors.torch.save_file(weights, fresh / "weights.safetensors")
            safetensors.torch.save_file(self.best, fresh / "best.safetensors")
            moments = {
                f"{slot}/{name}": tensor.detach().cpu()
                for name, parameter in self.names.items()
                for slot, tensor in self.optimizer.state[parameter].items()
            }
            safetensors.torch.save_file(moments, fresh / "optimizer.safetensors")
            runs.write_json(fresh / "state.json", asdict(self.state))
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        os.rename(fresh, self.part / f"epoch-{epoch}")
        for older in self.part.glob("epoch-*"):
            if older.name != f"epoch-{epoch}":
                shutil.rmtree(older, ignore_errors=True)

    def _restore(self) -> None:
        """Take up the newest complete checkpoint, if there is one."""
        numbers = [
            int(folder.name[6:])
            for folder in self.part.glob("epoch-*")
            if folder.name[6:].isdecimal()
        ]
        if not numbers:
            return
        folder = self.part / f"epoch-{max(numbers)}"
        try:
            self.model.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
            self.best = safetensors.torch.load_file(folder / "best.safetensors")
            moments = safetensors.torch.load_file(folder / "optimizer.safetensors")
            self.state = _State(**json.loads((folder / "state.json").read_text("utf-8")))
        except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: damaged checkpoint ({error}); remove {self.part} to start anew"
            ) from None
        for key, tensor in moments.items():
            slot, _, name = key.partition("/")
            parameter = self.names[name]
            self.optimizer.state[parameter][slot] = tensor.to(self.device)
        self._say(f"going on after epoch {self.state.epoch} of {self.settings.epochs}")

    def _say(self, line: str) -> None:
        if self.progress:
            tqdm.write(line, file=sys.stderr)


def _finish(
    run: TrainingRun, out: Path, base: str, key: dict[str, Any], command: Sequence[str]
) -> dict[str, Any]:
    """Write the model folder from the best epoch and move it to ``out``."""
    teacher, state = run.teacher, run.state
    folder = run.part / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run.model.to("cpu").eval()
    with quiet_transformers():
        run.model.save_pretrained(folder)
        teacher.hf_tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # the writer of the weights makes them private
        shutil.copymode(folder / "config.json", file)
    record = runs.run_record(
        "teacher",
        command=command,
        settings={**key["settings"], "max_length": run.max_length, "base": Path(base).name},
        metrics={
            "dev": state.best_scores,
            "best_epoch": state.best_epoch,
            "epochs": state.history,
            "parameters": teacher.parameters,
        },
        data=run.data,
        seconds=state.seconds,
        digest=run.kind.from_pretrained(folder, device="cpu").digest(),
        threads=torch.get_num_threads(),
        labels=teacher.labels,
        precision=teacher.precision,
        key=key,
    )
    runs.write_run(folder, record)
    os.replace(folder, out)
    return record


def _labels(train: Sequence[Corpus], dev: Sequence[Corpus]) -> list[str]:
    if not train or not dev:
        raise ValueError("both train and dev need at least one corpus")
    check_languages(dev, "dev")
    scheme = labelling_of([*train, *dev])
    types = frozenset[str]().union(*(c.types for c in train))
    if not types:
        raise ValueError(f"{train[0].path}: no entity in the training sentences")
    for corpus in dev:
        if unknown := sorted(corpus.types - types):
            raise ValueError(
                f"{corpus.path}: entity types {unknown} do not occur in train, which has "
                f"{sorted(types)}; a label map can rename or drop them"
            )
    if scheme == "tags":
        return sorted({tag for c in train for s in c.sentences for tag in s.tags or ()})
    return make_labels(types)


def _words_and_tags(
    corpora: Sequence[Corpus],
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    sentences = [s for corpus in corpora for s in corpus.sentences]
    return [s.words or () for s in sentences], [s.tags or () for s in sentences]


def _identity(corpus: Corpus) -> dict[str, Any]:
    """What of a corpus decides the result: its bytes, label map and language, not its name."""
    label_map = None if corpus.label_map is None else dict(corpus.label_map)
    language = {"language": corpus.language} if corpus.language else {}
    kind = corpus.describe("")["format"]  # by the file's name
    return {"digest": corpus.digest, "format": kind, "label_map": label_map, **language}
