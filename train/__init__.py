"""The distillation layer: corpora, teachers, students and the reports on them.

Lives in ``train/`` of the source tree and is installed as ``xdistil_fast.train``.
It needs the extra ``train`` (torch, transformers); names are imported on first use, because
reading and scoring data needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xdistil_fast.train.config import DistillConfig
    from xdistil_fast.train.distillation import distill
    from xdistil_fast.train.document_teacher import DocumentTeacher, fine_tune_classifier
    from xdistil_fast.train.finetune import TeacherSettings, fine_tune
    from xdistil_fast.train.teacher import Teacher

__all__ = [
    "DistillConfig",
    "DocumentTeacher",
    "Teacher",
    "TeacherSettings",
    "distill",
    "fine_tune",
    "fine_tune_classifier",
]

if __name__ != "xdistil_fast.train":
    raise ImportError(
        f"import this package as 'xdistil_fast.train', not as {__name__!r}: "
        "its modules refer to each other by that name"
    )

_MODULES = {
    "DistillConfig": "config",
    "DocumentTeacher": "document_teacher",
    "Teacher": "teacher",
    "TeacherSettings": "finetune",
    "distill": "distillation",
    "fine_tune": "finetune",
    "fine_tune_classifier": "document_teacher",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
