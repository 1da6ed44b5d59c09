"""What the evaluations of taggers and of classifiers share: telling and describing models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdistil_fast.model_io import CONFIG_FILE, ModelFolder
from xdistil_fast.text_model import TextModel

if TYPE_CHECKING:
    from xdistil_fast.train.teacher import Teacher

_MAX_CONFIG_BYTES = 16 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; empty where it is none: whoever loads it says what is wrong."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def about_student(name: str, content: ModelFolder, model: TextModel) -> dict[str, Any]:
    """What records say of a student."""
    about: dict[str, Any] = {
        "name": Path(name).name,
        "digest": content.digest,
        "kind": "student",
        "parameters": model.parameters,
        "precision": model.precision,
    }
    teacher = content.config.lineage.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("digest"), str):
        about["teacher_digest"] = teacher["digest"]
    return about


def about_teacher(name: str, teacher: Teacher) -> dict[str, Any]:
    """What records say of a teacher."""
    return {
        "name": Path(name).name,
        "digest": teacher.digest(),
        "kind": "teacher",
        "parameters": teacher.parameters,
        "precision": teacher.precision,
    }


def teacher_precision(options: Mapping[str, Any]) -> str:
    """The precision that a teacher is asked in; other options are a student's.

    Args:
        options: see `runtime_options`.

    Raises:
        ValueError: one is set that a teacher does not have.
    """
    for option, value in options.items():
        if value and option != "precision":
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} is for students; a teacher runs as torch runs it")
    precision: str = options.get("precision") or "float32"
    if precision not in ("float32", "bfloat16"):
        raise ValueError(
            f"--precision {precision} is for students; a teacher runs in float32 or bfloat16"
        )
    return precision
