"""Cut the parts of the data sets that the runs of RESULTS.md learn from.

Usage: python docs/records/subsets.py DATA OUT

Makes, always in the order of the files:

    OUT/ner, OUT/pos    LANG.{train,unlabelled,dev,test}.conll: the first sentences of train keep
                        their tags, the next 1,500 are transfer text; the first 100 of dev; at most
                        1,000 of test, or of dev after its first 100 where there is no test file.
                        What a language has too little for is shorter, or missing.
    OUT/flores          LANG.txt: FLORES-200 in the languages of OUT/pos.
    OUT/texts           SET.{train,train-500,dev}.jsonl: train-500 has 500 texts of each class, or
                        half of them where that is less; dev is the last tenth of train where there
                        is no dev file; reviews.txt: sentences of unlabelled film reviews.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

# One set a language, whose types PER, ORG and LOC can be told by their names.
NER_SETS = {
    "af": "nchlt", "ar": "news-transfer", "bg": "bsnlp2021", "bn": "bengali-ner",
    "bs": "wikiann-trans-ner", "cs": "bsnlp2021", "da": "uner", "de": "conll2003",
    "el": "elner4", "en": "conll2003", "es": "conll2002", "et": "estner",
    "fa": "news-transfer", "fi": "turku-ner", "fr": "news-transfer", "he": "nemo",
    "hi": "hiner", "hu": "nerkor", "id": "nergrit", "it": "news-transfer",
    "lv": "news-transfer", "mk": "wikiann-trans-ner", "nl": "conll2002",
    "no": "news-transfer", "pl": "bsnlp2021", "pt": "uner", "ro": "news-transfer",
    "ru": "bsnlp2021", "sk": "uner", "sl": "ssj500k", "sq": "wikiann-trans-ner",
    "sr": "uner", "sv": "uner", "tr": "turkish-wiki-ner", "uk": "news-transfer",
}  # fmt: skip
LABEL_MAP = {
    "PER": "PER", "per": "PER", "PERS": "PER", "PERSON": "PER",
    "ORG": "ORG", "org": "ORG", "ORGANIZATION": "ORG", "ORGANISATION": "ORG",
    "LOC": "LOC", "loc": "LOC", "LOCATION": "LOC", "PLACE": "LOC", "GPE": "LOC",
    "*": None,
}  # fmt: skip
TEXT_SETS = ("amazon-electronics", "bbc-news", "imdb", "sst2", "trec")
REVIEW_SENTENCES = 30_000


def read_lines(path: Path) -> list[str]:
    """Lines of a gzipped file, each with its end."""
    return gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)


def read_sentences(path: Path) -> list[str]:
    """Sentences of a CoNLL file, each with its blank line; none where there is no file."""
    if not path.exists():
        return []
    blocks = gzip.decompress(path.read_bytes()).decode().split("\n\n")
    return [f"{block.strip()}\n\n" for block in blocks if block.strip()]


def cut_sentences(source: Path, out: Path, language: str, labelled: int) -> None:
    """Cut one language; ``labelled`` sentences of train keep their tags."""
    train, dev, test = (
        read_sentences(source / f"{split}.conll.gz") for split in ("train", "dev", "test")
    )
    parts = {
        "train": train[:labelled],
        "unlabelled": train[labelled : labelled + 1500],
        "dev": dev[:100],
        "test": (test or dev[100:])[:1000],
    }
    for name, sentences in parts.items():
        if sentences:
            (out / f"{language}.{name}.conll").write_text("".join(sentences))


def cut_texts(source: Path, out: Path) -> None:
    """Cut one set of texts with classes."""
    rows = read_lines(source / "train.jsonl.gz")
    dev = source / "dev.jsonl.gz"
    if dev.exists():
        train, held_out = rows, read_lines(dev)
    else:
        train, held_out = rows[: -(len(rows) // 10)], rows[-(len(rows) // 10) :]
    classes = [json.loads(row)["label"] for row in train]
    sizes, taken = Counter(classes), Counter[str]()
    few = []
    for row, name in zip(train, classes, strict=True):
        if taken[name] < min(500, sizes[name] // 2):
            taken[name] += 1
            few.append(row)
    for part, chosen in {"train": train, "train-500": few, "dev": held_out}.items():
        (out / f"{source.name}.{part}.jsonl").write_text("".join(chosen))


def cut_reviews(source: Path, out: Path) -> None:
    """Sentences of 5 to 40 words, each once."""
    found: dict[str, None] = {}
    for line in read_lines(source):
        for sentence in re.split(r"(?<=[.!?])\s+", line.strip()):
            if 5 <= len(sentence.split()) <= 40:
                found[sentence] = None
    (out / "reviews.txt").write_text("".join(f"{s}\n" for s in list(found)[:REVIEW_SENTENCES]))


def main(data: Path, out: Path) -> None:
    """Cut everything."""
    for folder in ("ner", "pos", "flores", "texts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for language, name in NER_SETS.items():
        cut_sentences(data / name / language, out / "ner", language, 800)
    (out / "ner" / "label-map.json").write_text(json.dumps(LABEL_MAP))
    for source in sorted((data / "ud-pos").iterdir()):
        cut_sentences(source, out / "pos", source.name, 600)
        if (out / "pos" / f"{source.name}.train.conll").exists():
            text = gzip.decompress((data / "flores200" / f"{source.name}.txt.gz").read_bytes())
            (out / "flores" / f"{source.name}.txt").write_bytes(text)
    for name in TEXT_SETS:
        cut_texts(data / name, out / "texts")
    cut_reviews(data / "imdb" / "unlabeled.txt.gz", out / "texts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
