"""Masked-language-model training of an encoder on unlabelled text, before it becomes a teacher.

Step 1 of the code of XtremeDistil (Mukherjee and Hassan Awadallah, ACL 2020): sequences of 128
tokens, 15 % of the pieces masked as whole words, learning rate 2e-5. Sentences are put one behind
the other into sequences, never across their border. Of the chosen pieces 80 % become the mask, 10 %
a random piece, 10 % stay (Devlin et al., NAACL 2019).

The work goes on in ``OUT.part`` beside the output folder ``OUT``: ``run_key.json``, the pieces of
all text (``ids.bin``, ``first.bin``), and a checkpoint. Everything random is drawn from the seed
and the number of the step, so a run that was killed and started again ends with the same bytes.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tqdm import tqdm

from xdistil_fast.train import checkpoint, runs
from xdistil_fast.train.alignment import IGNORED, align, align_text, split_points
from xdistil_fast.train.corpora import Sentence, read_transfer
from xdistil_fast.train.devices import fast_bf16, pick_device
from xdistil_fast.train.finetune import adamw
from xdistil_fast.train.learning_rate import rate_factor
from xdistil_fast.train.teacher import (
    Model,
    Teacher,
    check_finite,
    check_vocabulary,
    load_config,
    load_tokenizer,
    quiet_transformers,
    resolve_name,
    weights_digest,
)
from xdistil_fast.train.texts import describe_text

_CHUNK = 4096  # sentences tokenised at once
_MASKED, _RANDOM = 0.8, 0.1  # of the chosen pieces
_MOST_HELD_OUT = 1000  # sequences; more would only take time
_EVERY = 20  # of so many sequences one is held out, up to that

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Settings of a run.

    Attributes:
        epochs: passes over the text.
        learning_rate: peak of a linear warm-up and decay to 0.
        batch_size: sequences a step.
        length: tokens of a sequence, special tokens included. Never more than the model takes.
        mask: share of the pieces to be guessed.
        warmup: share of all steps in which the rate rises.
        weight_decay: AdamW's, for matrices only.
        clip: bound on the norm of the gradient.
        seed: of everything random.
        device: ``auto``, ``cpu``, ``cuda``, ...
        checkpoint_minutes: time between checkpoints.
    """

    epochs: int = 1
    learning_rate: float = 2e-5
    batch_size: int = 32
    length: int = 128
    mask: float = 0.15
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("length", 8)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value < 2**31:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {low}")
        for name, zero_ok in (
            ("learning_rate", False), ("mask", False), ("warmup", True), ("weight_decay", True)
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 0 and not zero_ok):
                raise ValueError(
                    f"{name} is {value!r}; allowed: {'0' if zero_ok else 'above 0'} to 1"
                )
        for name in ("clip", "checkpoint_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: above 0")


def pretrain(
    base: Path | str,
    text: Sequence[str],
    out: Path | str,
    settings: PretrainSettings | None = None,
    *,
    command: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Go on with the masked-language-model training of an encoder.

    Args:
        base: local folder or Hub id of a Hugging Face encoder.
        text: files as for transfer text.
        out: folder to make; ``fine_tune`` takes it for a base. One made by the same run is left as
            it is.
        settings: see :class:`PretrainSettings`.
        command: argv for ``run.json``.
        progress: show bars and lines on standard error.

    Returns:
        The content of ``run.json``; ``metrics`` has the perplexity of held-out sequences before
        and after, and whether a new head had to be made.

    Raises:
        ValueError: too little text; a base model or tokeniser that does not fit; ``out`` or its
            ``.part`` holding something else; loss not finite.
        OSError: a full disk, say. The same call goes on from the last checkpoint.
        BlockingIOError: another process is making this output.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the state was saved.
    """
    settings = settings or PretrainSettings()
    out = Path(out)
    name = resolve_name(base)
    device = pick_device(settings.device)
    checkpoint.check_output(out)
    data = [describe_text(path, "text") for path in text]
    torch.manual_seed(settings.seed)
    with quiet_transformers():
        hf_tokenizer = load_tokenizer(name)
        model, new_head = load_masked_model(name)
    check_vocabulary(name, model, hf_tokenizer)
    if hf_tokenizer.mask_token_id is None:
        raise ValueError(f"{name}: its tokeniser has no mask piece; another base model is needed")
    # The tokeniser, special ids and lengths are those of a teacher.
    encoder = Teacher(model, hf_tokenizer, [])
    key: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(settings).items() if k != "checkpoint_minutes"},
        "base": weights_digest(model, encoder.tokenizer.to_str()),
        "text": [[entry["digest"], entry["format"]] for entry in data],
    }
    part = out.with_name(out.name + ".part")
    finished = checkpoint.finished_before(out, key)
    if finished is not None:
        if checkpoint.key_of(part) == key:  # killed between the last two steps
            shutil.rmtree(part)
        return finished
    checkpoint.open_part(part, key)
    with checkpoint.alone(part):
        sequences = _Sequences(
            part, encoder, text, settings, sum(e["sentences"] for e in data), progress
        )
        model.to(device)
        run = _Run(encoder, settings, part, sequences, progress)
        if new_head:
            run.say(
                f"{name} has no head for masked pieces: a new one is made, tied to the embeddings; "
                "it starts untrained"
            )
        run.go()
        record = _finish(run, out, name, key, data, new_head, command)
        shutil.rmtree(part)
    return record


def load_masked_model(name: str) -> tuple[Model, bool]:
    """Load a base encoder with its head for masked pieces, or a new head.

    Returns:
        The model, and whether the head is new: random but for the table of pieces, which is tied
        to the embeddings.

    Raises:
        ValueError: weights of the encoder that are missing, misshapen or not finite, or a kind of
            model that has no such head.
    """
    config, _ = load_config(name)
    try:
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            name, config=config, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # damaged weights raise many kinds of errors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{name}: cannot load it for masked pieces ({lines[0]})") from None
    body = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    if bad := [key for key in missing if key.startswith(body)]:
        raise ValueError(f"{name}: weights of the encoder are missing: {', '.join(bad[:4])}")
    model.tie_weights()
    check_finite(name, model)
    return model, bool(missing)


def choose_masks(
    first: npt.NDArray[np.bool_], share: float, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Pieces to be guessed: whole words in random order until the share is reached.

    Args:
        first: [P] whether a piece begins a word; the first one does in any case.
        share: of the P pieces; at least one word is chosen.
        generator: source of the order.

    Returns:
        [P]. A word that would go beyond the share is left out, as in BERT's own code, unless it is
        the only one.
    """
    starts = first.copy()
    starts[:1] = True
    word = np.cumsum(starts) - 1
    sizes = np.bincount(word)
    budget = max(1, round(share * len(first)))
    chosen = np.zeros(len(sizes), bool)
    taken = 0
    for number in generator.permutation(len(sizes)).tolist():
        if taken >= budget:
            break
        if taken + sizes[number] <= budget or not taken:
            chosen[number] = True
            taken += int(sizes[number])
    pieces: npt.NDArray[np.bool_] = chosen[word]
    return pieces


class _Sequences:
    """Pieces of all text on disk, and where the sequences lie among them."""

    def __init__(
        self,
        part: Path,
        encoder: Teacher,
        text: Sequence[str],
        settings: PretrainSettings,
        expected: int,
        progress: bool,
    ) -> None:
        special = len(encoder.prefix_ids) + len(encoder.suffix_ids)
        self.size = min(settings.length - special, encoder.max_pieces)
        ids, first = part / "ids.bin", part / "first.bin"
        starts = [0]
        total = 0
        with (
            ids.open("wb") as ids_stream,
            first.open("wb") as first_stream,
            tqdm(
                total=expected, desc="pieces", unit="sentence", unit_scale=True,
                disable=None if progress else True, dynamic_ncols=True, leave=False,
            ) as bar,
        ):  # fmt: skip
            for run_ids, run_first in _runs(encoder, text, self.size, bar):
                if total - starts[-1] + len(run_ids) > self.size:
                    starts.append(total)
                ids_stream.write(run_ids.astype(np.int32).tobytes())
                first_stream.write(run_first.astype(np.uint8).tobytes())
                total += len(run_ids)
        self.bounds = np.array([*starts, total], np.int64)
        count = len(self.bounds) - 1
        if count < 2:
            raise ValueError(
                f"the text makes {count if total else 0} sequences of {settings.length} tokens; "
                "at least 2 are needed, one of them to be held out"
            )
        held = np.arange(count) % _EVERY == _EVERY - 1
        held[np.flatnonzero(held)[_MOST_HELD_OUT:]] = False
        if not held.any():
            held[-1] = True
        self.held_out, self.train = np.flatnonzero(held), np.flatnonzero(~held)
        self._ids = np.memmap(ids, np.int32, "r")
        self._first = np.memmap(first, np.uint8, "r")

    def get(self, number: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Pieces of a sequence and which of them begin words."""
        run = slice(self.bounds[number], self.bounds[number + 1])
        return self._ids[run].astype(np.int64), self._first[run].astype(bool)


def _runs(
    encoder: Teacher, text: Sequence[str], size: int, bar: tqdm[Any]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Sentences as pieces, long ones cut between words; in the order of the text."""
    chunk: list[Sentence] = []

    def encoded() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        split = chunk[0].words is not None
        alignment = (
            align(encoder.tokenizer, [s.words or () for s in chunk])
            if split
            else align_text(encoder.tokenizer, [s.text or "" for s in chunk])
        )
        first = np.zeros(len(alignment.ids), np.uint8)
        first[alignment.first_piece[alignment.first_piece >= 0]] = 1
        for sentence in range(len(alignment)):
            for start, stop in split_points(alignment, sentence, size):
                yield alignment.ids[start:stop], first[start:stop]
        bar.update(len(chunk))

    for sentence in read_transfer(text):
        if chunk and (len(chunk) == _CHUNK or (sentence.words is None) != (chunk[0].words is None)):
            yield from encoded()
            chunk = []
        chunk.append(sentence)
    if chunk:
        yield from encoded()


class _Run:
    """One training run: model, optimiser, position."""

    def __init__(
        self,
        encoder: Teacher,
        settings: PretrainSettings,
        part: Path,
        sequences: _Sequences,
        progress: bool,
    ) -> None:
        self.encoder, self.settings, self.part = encoder, settings, part
        self.sequences, self.progress = sequences, progress
        self.model, self.device = encoder.model, encoder.device
        self.names = dict(self.model.named_parameters())
        self.optimizer = adamw(
            self.names.values(), settings.learning_rate, settings.weight_decay, self.device
        )
        self.autocast = fast_bf16(self.device)
        self.pieces = self.model.get_input_embeddings().weight.shape[0]
        vocabulary = encoder.tokenizer.get_vocab(with_added_tokens=True)
        special = set(encoder.hf_tokenizer.all_special_ids)
        self.ordinary = np.array(sorted(set(vocabulary.values()) - special), np.int64)
        self.steps_per_epoch = math.ceil(len(sequences.train) / settings.batch_size)
        self.step = 0
        self.seconds = 0.0
        self.loss = 0.0  # sum over the steps of the epoch that goes on
        self.before = 0.0
        self.history: list[dict[str, float]] = []

    def go(self) -> None:
        """Train what is left."""
        settings = self.settings
        self._restore()
        if not self.before:
            self.before = self._perplexity()
            self.say(f"held-out perplexity before: {self.before:.2f}")
        steps = self.steps_per_epoch * settings.epochs
        started = saved = time.perf_counter()
        with (
            checkpoint.StopRequest() as stop,
            tqdm(
                total=steps, initial=self.step, desc="masked pieces", unit="step",
                disable=None if self.progress else True, dynamic_ncols=True, leave=False,
            ) as bar,
        ):  # fmt: skip
            order = self._order(self.step // self.steps_per_epoch)
            while self.step < steps:
                epoch, number = divmod(self.step, self.steps_per_epoch)
                if number == 0:
                    order = self._order(epoch)
                    self.loss = 0.0
                rate = settings.learning_rate * rate_factor(self.step, steps, settings.warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                batch = order[number * settings.batch_size :][: settings.batch_size]
                self.loss += self._train(batch)
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{self.loss / (number + 1):.4f}", refresh=False)
                if number + 1 == self.steps_per_epoch:
                    entry = {
                        "epoch": epoch + 1,
                        "loss": self.loss / self.steps_per_epoch,
                        "perplexity": self._perplexity(),
                    }
                    self.history.append(entry)
                    self.say(
                        f"epoch {epoch + 1}/{settings.epochs}: loss {entry['loss']:.4f}, held-out "
                        f"perplexity {entry['perplexity']:.2f}"
                    )
                now = time.perf_counter()
                due = now - saved > 60 * settings.checkpoint_minutes
                if stop.asked or due or number + 1 == self.steps_per_epoch:
                    self.seconds += now - started
                    self._save()
                    started = saved = time.perf_counter()
                    if stop.asked:
                        raise KeyboardInterrupt(f"stopped after step {self.step}")

    def _order(self, epoch: int) -> Ints:
        generator = np.random.default_rng([self.settings.seed, epoch])
        return generator.permutation(self.sequences.train)

    def _train(self, batch: Ints) -> float:
        settings = self.settings
        # Masks and dropout depend on seed and step only, so that a resumed run draws the same.
        state = np.random.SeedSequence([settings.seed, self.step, 1]).generate_state(1)
        torch.manual_seed(int(state[0]))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch, np.random.default_rng([settings.seed, self.step, 2]))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss became {value}; a lower learning rate than "
                f"{settings.learning_rate:g} may help"
            )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.names.values(), settings.clip)
        self.optimizer.step()
        return value

    def _loss(
        self, batch: Ints, generator: np.random.Generator, reduction: str = "mean"
    ) -> torch.Tensor:
        """Cross-entropy of the masked pieces of some sequences."""
        rows = [self.sequences.get(number) for number in batch.tolist()]
        input_ids, mask = self.encoder.collate([ids for ids, _ in rows])
        targets = np.full_like(input_ids, IGNORED)
        begin = len(self.encoder.prefix_ids)
        for row, (ids, first) in enumerate(rows):
            chosen = np.flatnonzero(choose_masks(first, self.settings.mask, generator))
            targets[row, begin + chosen] = ids[chosen]
            fate = generator.random(len(chosen))
            other = self.ordinary[generator.integers(len(self.ordinary), size=len(chosen))]
            shown = np.where(fate < _MASKED, self.encoder.hf_tokenizer.mask_token_id, other)
            shown = np.where(fate < _MASKED + _RANDOM, shown, ids[chosen])
            input_ids[row, begin + chosen] = shown
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(
                input_ids=torch.from_numpy(input_ids).to(self.device),
                attention_mask=torch.from_numpy(mask).to(self.device),
            ).logits
        where = torch.from_numpy(targets != IGNORED).to(self.device)
        return torch.nn.functional.cross_entropy(
            logits[where].float(), torch.from_numpy(targets).to(self.device)[where],
            reduction=reduction,
        )  # fmt: skip

    def _perplexity(self) -> float:
        """Exp of the mean cross-entropy of held-out masked pieces; the same masks every time."""
        self.model.eval()
        generator = np.random.default_rng([self.settings.seed, 3])
        total, count = 0.0, 0
        held, size = self.sequences.held_out, self.settings.batch_size
        with torch.inference_mode():
            for start in range(0, len(held), size):
                losses = self._loss(held[start : start + size], generator, "none")
                total += float(losses.double().sum())
                count += len(losses)
        return math.exp(min(total / count, 700.0))

    def _save(self) -> None:
        tensors = {f"weights/{k}": v.detach().cpu().numpy() for k, v in self.names.items()}
        for name, parameter in self.names.items():
            # A frozen parameter, a table of sinusoids for one, has no state.
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{slot}/{name}"] = value.detach().cpu().numpy()
        state = {k: getattr(self, k) for k in ("step", "seconds", "loss", "before", "history")}
        checkpoint.save_checkpoint(self.part, tensors, state)

    def _restore(self) -> None:
        saved = checkpoint.load_checkpoint(self.part)
        if saved is None:
            return
        tensors, state = saved
        with torch.no_grad():
            for name, parameter in self.names.items():
                parameter.copy_(torch.from_numpy(tensors[f"weights/{name}"]))
                if f"step/{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        slot: torch.from_numpy(tensors[f"{slot}/{name}"]).to(self.device)
                        for slot in ("step", "exp_avg", "exp_avg_sq")
                    }
        for key, value in state.items():
            setattr(self, key, value)
        self.say(f"going on after step {self.step}")

    def say(self, line: str) -> None:
        """A line on standard error."""
        if self.progress:
            tqdm.write(line, file=sys.stderr)


def _finish(
    run: _Run,
    out: Path,
    base: str,
    key: dict[str, Any],
    data: list[dict[str, Any]],
    new_head: bool,
    command: Sequence[str],
) -> dict[str, Any]:
    """Write the model folder and move it to ``out``."""
    folder = run.part / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run.model.to("cpu").eval()
    with quiet_transformers():
        run.model.save_pretrained(folder)
        run.encoder.hf_tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # the writer of the weights makes them private
        shutil.copymode(folder / "config.json", file)
    record = runs.run_record(
        "pretrain",
        command=command,
        settings={**key["settings"], "base": Path(base).name},
        metrics={
            "perplexity_before": run.before,
            "perplexity": run.history[-1]["perplexity"],
            "epochs": run.history,
            "new_head": new_head,
            "parameters": run.encoder.parameters,
            "sequences": len(run.sequences.train),
            "held_out_sequences": len(run.sequences.held_out),
        },
        data=data,
        seconds=run.seconds,
        digest=weights_digest(run.model, run.encoder.tokenizer.to_str()),
        threads=torch.get_num_threads(),
        precision="bfloat16" if run.autocast else "float32",
        key=key,
    )
    runs.write_run(folder, record)
    os.replace(folder, out)
    return record
