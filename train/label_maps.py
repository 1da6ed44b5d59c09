"""Label maps: entity types, or classes, under other names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, cast

LabelMap: TypeAlias = Mapping[str, "str | None"]


def load_label_map(path: Path | str, *, classes: bool = False) -> dict[str, str | None]:
    """Read a ``--label-map`` file.

    A JSON object ``{"person": "PER", "product": null}``: types are renamed, null makes them
    ``O``; the key ``"*"`` stands for all types not named; without it those are kept. Of ``classes``
    of texts null leaves their texts out.

    Raises:
        ValueError: not UTF-8 JSON, not an object, a key twice, or a value that is no type.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"{path}: label map names {twice!r} twice")
        return mapping

    try:
        raw = json.loads(Path(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: label map is not JSON in UTF-8 ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f'{path}: label map must be a JSON object like {{"person": "PER", '
            f'"product": null}}, not {type(raw).__name__}'
        )
    return check_label_map(raw, str(path), classes=classes)


def check_label_map(
    mapping: Mapping[str, object], name: str = "label_map", *, classes: bool = False
) -> dict[str, str | None]:
    """Check the keys and values of a label map; see :func:`load_label_map`.

    Args:
        mapping: the map.
        name: of it, for messages.
        classes: of texts, whose names may hold white space; else types of entities.

    Raises:
        ValueError: a key or value that cannot be an entity type; ``name`` stands in the message.
    """
    for key, value in mapping.items():
        if not key:
            raise ValueError(f"{name}: label map has an empty type name")
        if value is None:
            continue
        if classes:
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"{name}: label map sends {key!r} to {value!r}; allowed: a class name, or null"
                )
            continue
        if not isinstance(value, str) or not value or value == "O" or re.search(r"\s", value):
            raise ValueError(
                f"{name}: label map sends {key!r} to {value!r}; allowed: a type name without "
                "white space, or null for 'O'"
            )
    return cast("dict[str, str | None]", dict(mapping))
