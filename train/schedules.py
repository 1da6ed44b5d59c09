"""The recipe of a distillation as data: stages, and the fits they are made of.

A stage says which losses are trained on, on which text, and in which order the layers join in. A
fit is one pass of the optimiser: a stage that trains all layers at once is one fit; one that
unfreezes layers is a fit for each, from the top of the student down, and layers once unfrozen stay
so. Each fit has its own learning-rate decay and Adam state, stops early, and hands its best weights
to the next one.

The named schedules are those of XtremeDistil (Mukherjee and Hassan Awadallah, ACL 2020, Algorithm 1
and Table 3). Where ours differ:

* Logits and representations are trained on all text, the labelled included: it has the teacher's
  outputs too. The paper names the unlabelled text alone.
* Logits and labels share one output layer. The paper's students get a new softmax layer for the
  stage on labels; ours start it from the layer that matches the logits, whose softmax is the
  teacher's own answer already, so that dev F1 goes on where it was.
* Our output layer sits on the BiLSTM, as the paper's text has it. So the projection serves the
  representation alone, other stages do not unfreeze it, and D4.2 is 1 + 3 + 3 fits. Where a student
  is ``projected``, it sits on the projection, as in the paper's code, and they are 1 + 4 + 4.
* An epoch is chosen by the score on dev where the output layer is trained; the paper goes by the
  loss on a tenth of the data, as we do where the representation alone is trained.
* ``joint-labels`` and ``logits-labels`` are ours: D1, or its logits alone, and then the labels, as
  in D4.1 but without hidden states, which take most of the cache.
* D0 is D0-S on the files of one language; which files is up to the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

Data: TypeAlias = Literal["all", "labelled", "transfer"]

LOSSES = ("hard", "soft", "representation")
GROUPS = ("output", "projection", "bilstm", "embedding")  # from the top of the student down


@dataclass(frozen=True)
class Stage:
    """A part of a schedule.

    Attributes:
        name: what it is called in the history.
        losses: factor of each loss of :data:`LOSSES`; those not named are not trained on. The
            run's ``hard_weight``, ``soft_weight`` and ``representation_weight`` multiply them.
        data: sentences trained on: ``all``, ``labelled`` or ``transfer``.
        unfreeze: layers of :data:`GROUPS` in the order in which they join in, one fit each;
            empty to train all of them in one fit.
        epochs: most passes over the data in each fit; the run's ``epochs`` where None.
        lr: highest learning rate; the run's ``lr`` where None.
        patience: epochs without a better score after which a fit ends; 0 for no limit. The run's
            ``patience`` goes before it.

    Raises:
        ValueError: a loss or layer that does not exist, or no loss at all.
    """

    name: str
    losses: Mapping[str, float]
    data: Data = "all"
    unfreeze: tuple[str, ...] = ()
    epochs: int | None = None
    lr: float | None = None
    patience: int = 0

    def __post_init__(self) -> None:
        """Checks names; the mapping becomes read-only."""
        for what, names, allowed in (
            ("losses", self.losses, LOSSES),
            ("unfreeze", self.unfreeze, GROUPS),
        ):
            if unknown := sorted(set(names) - set(allowed)):
                raise ValueError(f"stage {self.name}: {what} has {unknown}; allowed: {allowed}")
        if not self.losses:
            raise ValueError(f"stage {self.name}: no loss to train on")
        object.__setattr__(self, "losses", MappingProxyType(dict(self.losses)))


@dataclass(frozen=True)
class Fit:
    """One pass of the optimiser.

    Attributes:
        stage: what it is a part of.
        name: the layer that joins in, or ``all``.
        groups: all layers that are trained.
    """

    stage: Stage
    name: str
    groups: tuple[str, ...] = field(default=GROUPS)


def layers_of(losses: Collection[str], projected: bool = False) -> set[str]:
    """Layers of :data:`GROUPS` that losses depend on.

    Args:
        losses: of :data:`LOSSES`.
        projected: whether the output layer reads the projection.
    """
    found = {"bilstm", "embedding"}
    if "representation" in losses:
        found.add("projection")
    if {"hard", "soft"} & set(losses):
        found |= {"output", "projection"} if projected else {"output"}
    return found


def fits_of(stage: Stage, groups: Collection[str]) -> list[Fit]:
    """The fits of a stage.

    Args:
        stage: a part of a schedule.
        groups: layers that the stage's losses reach; others are left out.
    """
    if not stage.unfreeze:
        return [Fit(stage, "all", tuple(name for name in GROUPS if name in groups))]
    steps = tuple(name for name in stage.unfreeze if name in groups)
    return [Fit(stage, name, steps[: i + 1]) for i, name in enumerate(steps)]


_LABELS = Stage("labels", {"hard": 1.0}, data="labelled")
_JOINT = Stage("joint", {"hard": 1.0, "soft": 1.0})
_REPRESENTATION = Stage("representation", {"representation": 1.0}, patience=5)
_STAGED_LOGITS = Stage("logits", {"soft": 1.0}, patience=5)
_STAGED_LABELS = replace(_LABELS, patience=5)
_STAGED_JOINT = replace(_JOINT, patience=5)


def _gradual(stage: Stage) -> Stage:
    return replace(stage, unfreeze=GROUPS)


SCHEDULES: Mapping[str, tuple[Stage, ...]] = MappingProxyType(
    {
        "joint-labels": (_JOINT, _STAGED_LABELS),
        "logits-labels": (_STAGED_LOGITS, _STAGED_LABELS),
        "d0": (_LABELS,),
        "d0-s": (_LABELS,),
        "d1": (_JOINT,),
        "d2": (Stage("joint", {"hard": 1.0, "soft": 1.0, "representation": 1.0}),),
        "d3.1": (_REPRESENTATION, _STAGED_JOINT),
        "d3.2": (_REPRESENTATION, _gradual(_STAGED_JOINT)),
        "d4.1": (_REPRESENTATION, _STAGED_LOGITS, _STAGED_LABELS),
        "d4.2": (_REPRESENTATION, _gradual(_STAGED_LOGITS), _gradual(_STAGED_LABELS)),
    }
)
