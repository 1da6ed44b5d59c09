"""Writes `unicode_tables.h`: what `tokenizers` and Python know of every code point.

    python csrc/text/make_unicode_tables.py csrc/text/unicode_tables.h

WordPiece must cut text as the `tokenizers` library does, whose parts rest on several versions of
Unicode. So that library itself is asked, code point by code point, what its normaliser and its
pre-tokenizer do. Which characters are combining marks (general category M), for the ends of
entities, is asked of Python's `unicodedata`.
"""

from __future__ import annotations

import sys
import textwrap
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import normalizers, pre_tokenizers

POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
HANGUL = range(0xAC00, 0xAC00 + 11172)  # decomposed by arithmetic
STEPS = (1, 2)  # between the capitals of a range


def bert_normalizer(**options: bool) -> normalizers.Normalizer:
    """`BertNormalizer` that does only what is asked for."""
    nothing = {
        "clean_text": False,
        "handle_chinese_chars": False,
        "strip_accents": False,
        "lowercase": False,
    }
    return normalizers.BertNormalizer(**(nothing | options))


def changes(normalizer: normalizers.Normalizer) -> dict[int, str]:
    """Code points that do not stay as they are when they stand alone, and what they become."""
    out = {}
    for c in POINTS:
        after = normalizer.normalize_str(chr(c))
        if after != chr(c):
            out[c] = after
    return out


def is_split(c: int) -> bool:
    """Whether the pre-tokenizer makes of the code point a word of its own."""
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str("a" + chr(c) + "a")) == 3


def is_white(c: int) -> bool:
    """Whether the pre-tokenizer drops the code point."""
    return not pre_tokenizers.BertPreTokenizer().pre_tokenize_str(chr(c))


def combining_classes(decomposed: dict[int, str]) -> dict[int, int]:
    """Canonical combining classes, from the order in which NFD puts pairs of marks."""
    nfd = normalizers.NFD()

    def swaps(first: str, second: str) -> bool:
        return nfd.normalize_str(first + second) == second + first != first + second

    # One mark of each class to compare with, of those that the library takes for marks.
    lowest, highest = "\u0334", "\u0345"
    known: dict[int, str] = {}
    for c in POINTS:
        is_mark = unicodedata.combining(chr(c)) and c not in decomposed
        if is_mark and (swaps(chr(c), lowest) or swaps(highest, chr(c))):
            known.setdefault(unicodedata.combining(chr(c)), chr(c))
    order = sorted(known)

    out = {}
    for c in POINTS:
        char = chr(c)
        if c in decomposed or c in HANGUL:
            continue
        if not swaps(highest, char) and not swaps(char, lowest):
            continue
        below = max((k for k in order if swaps(char, known[k])), default=0)
        above = min((k for k in order if swaps(known[k], char)), default=255)
        between = [k for k in order if below < k < above]
        if len(between) != 1:
            raise SystemExit(f"U+{c:04X}: combining class between {below} and {above}")
        out[c] = between[0]
    return out


def ranges(points: Iterable[int]) -> list[int]:
    """First and last of every run of consecutive code points, flat."""
    out: list[int] = []
    for c in sorted(points):
        if out and out[-1] == c - 1:
            out[-1] = c
        else:
            out += [c, c]
    return out


def valued_ranges(values: dict[int, int]) -> list[int]:
    """First, last, value of every run of consecutive code points of one value, flat."""
    out: list[int] = []
    for c in sorted(values):
        if out and out[-2] == c - 1 and out[-1] == values[c]:
            out[-2] = c
        else:
            out += [c, c, values[c]]
    return out


def lower_ranges(lower: dict[int, str]) -> list[int]:
    """First, last, step, and what is added to each, flat."""
    runs: list[list[int]] = []
    for c in sorted(lower):
        added = ord(lower[c]) - c
        if runs:
            run = runs[-1]
            step = c - run[1]
            if run[3] == added and step in STEPS and run[2] in (0, step):
                run[1:3] = [c, step]
                continue
        runs.append([c, c, 0, added])
    return [value for first, last, step, added in runs for value in (first, last, step or 1, added)]


def decomposition_steps(nfd: dict[int, str]) -> list[int]:
    """Code point, first part, second part or 0, flat; the first may have parts of its own."""
    whole = {after: c for c, after in nfd.items()}
    out = []
    for c, after in sorted(nfd.items()):
        if len(after) == 1:
            out += [c, ord(after), 0]
        else:
            first = after[:-1]
            out += [c, ord(first) if len(first) == 1 else whole[first], ord(after[-1])]
    return out


def table(kind: str, name: str, comment: str, values: list[int]) -> str:
    """One C++ array."""
    body = textwrap.fill(
        ",".join(map(str, values)).replace(",", ", "), 118, break_on_hyphens=False
    ).replace(", ", ",")
    return f"// {comment}\nconstexpr {kind} {name}[] = {{\n{body}}};\n"


def main(path: Path) -> None:
    """Asks, checks what the format relies on, writes."""
    clean = changes(bert_normalizer(clean_text=True))
    chinese = changes(bert_normalizer(handle_chinese_chars=True))
    nfd = changes(normalizers.NFD())
    lower = changes(bert_normalizer(lowercase=True))
    stripped = changes(bert_normalizer(strip_accents=True))
    nonspacing = [c for c, after in stripped.items() if not after and c not in nfd]
    white = [c for c in POINTS if is_white(c)]
    split = [c for c in POINTS if c not in set(white) and is_split(c)]

    if set(clean.values()) - {"", " "}:
        raise SystemExit("clean_text does more than drop and make spaces")
    if any(after != f" {chr(c)} " for c, after in chinese.items()):
        raise SystemExit("handle_chinese_chars does more than put spaces around")
    for c, after in stripped.items():
        if after != "".join(x for x in nfd.get(c, chr(c)) if ord(x) not in set(nonspacing)):
            raise SystemExit(f"U+{c:04X}: strip_accents is not NFD without nonspacing marks")
    if any(len(nfd.get(c, " ")) > 1 for c in chinese):
        raise SystemExit("a Chinese character becomes several by NFD")
    for c in HANGUL:
        lead, rest = divmod(c - 0xAC00, 588)
        vowel, tail = divmod(rest, 28)
        parts = [0x1100 + lead, 0x1161 + vowel, *([0x11A7 + tail] if tail else [])]
        if nfd.pop(c) != "".join(map(chr, parts)):
            raise SystemExit(f"U+{c:04X} is not decomposed by the Hangul rule")
    # One capital becomes two characters; it has a table entry of its own.
    pairs = {c: after for c, after in lower.items() if len(after) != 1}
    if pairs != {0x130: "i\u0307"}:
        raise SystemExit(f"lower-casing changes the length of {pairs}")
    single = {c: after for c, after in lower.items() if c not in pairs}
    combining = combining_classes(nfd)
    if combining.keys() & (lower.keys() | chinese.keys() | clean.keys() | {*white, *split}):
        raise SystemExit("a combining mark is more than a mark")

    marks = [c for c in POINTS if unicodedata.category(chr(c))[0] == "M"]
    point = "uint32_t"
    tables = [
        table(
            point,
            "kDropped",
            "clean_text drops these: first, last.",
            ranges(c for c, after in clean.items() if not after),
        ),
        table(
            point,
            "kBlank",
            "clean_text makes spaces of these: first, last.",
            ranges([c for c, after in clean.items() if after] + [0x20]),
        ),
        table(
            point,
            "kChinese",
            "handle_chinese_chars puts spaces around these: first, last.",
            ranges(chinese),
        ),
        table(point, "kWhite", "The pre-tokenizer cuts at these: first, last.", ranges(white)),
        table(
            point,
            "kPunctuation",
            "The pre-tokenizer makes words of these: first, last.",
            ranges(split),
        ),
        table(
            point,
            "kNonspacing",
            "strip_accents drops these after NFD: first, last.",
            ranges(nonspacing),
        ),
        table(
            point,
            "kCombining",
            "Canonical combining classes in NFD, where not 0: first, last, class.",
            valued_ranges(combining),
        ),
        table(
            "int32_t",
            "kLower",
            "lowercase: first, last, step, what is added. U+0130 becomes two: i, U+0307.",
            lower_ranges(single),
        ),
        table(
            point,
            "kDecomposed",
            "NFD, Hangul syllables apart, one step of it: code point, its first part (which may go "
            "on to be decomposed), its second or 0.",
            decomposition_steps(nfd),
        ),
        table(
            point,
            "kMarks",
            f"General category M in Unicode {unicodedata.unidata_version}: first, last.",
            ranges(marks),
        ),
    ]
    path.write_text(
        "// Written by make_unicode_tables.py from tokenizers "
        f"{tokenizers.__version__} and Python's Unicode {unicodedata.unidata_version}.\n"
        "#pragma once\n\n#include <cstdint>\n\nnamespace xdf::unicode {\n\n"
        "// clang-format off\n" + "\n".join(tables) + "// clang-format on\n\n"
        "}  // namespace xdf::unicode\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
