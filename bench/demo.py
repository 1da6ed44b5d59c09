"""What `make demo` runs: entities in a few sentences, then the speed from text to entities."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from xdistil_fast import Tagger, _core

_MODEL = "en-ner"
_TEXTS = [
    "Angela Merkel met Tim Cook in Berlin.",
    "The Danish shipping group Maersk moved its African headquarters from Lagos to Nairobi.",
    "Marie Curie left Warsaw for Paris in 1891 and taught at the Sorbonne.",
    "Toyota and Panasonic will build the plant near Osaka, said Akio Toyoda 🚗.",
    "Nothing in this sentence has a name, and the tagger should leave it alone.",
    "Serena Williams beat Garbiñe Muguruza in Melbourne, the BBC reported.",
]
_COPIES = 200
_SECONDS = 2.0


def _seconds(call: Callable[[], object]) -> float:
    """Median time of a call, over two seconds of them."""
    call()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    """Tags, prints, measures."""
    tagger = Tagger.from_pretrained(_MODEL)
    print(f"\n{tagger}\n")
    for text, entities in zip(_TEXTS, tagger(_TEXTS), strict=True):
        print(text)
        for entity in entities:
            print(f"    {entity['entity_group']:<4} {entity['score']:.3f}  {entity['word']}")

    batch = _TEXTS * _COPIES
    pieces = tagger.tag_batch(batch).pieces
    whole = _seconds(lambda: tagger(batch))
    single = _seconds(lambda: tagger(_TEXTS[0]))
    print(
        f"\n{pieces / whole:,.0f} tokens/s from text to entities "
        f"({len(batch)} sentences at a time, {_core.default_threads()} threads, "
        f"{_core.active_isa()}); one sentence alone takes {single * 1e3:.2f} ms."
    )
    print(f"torch imported: {'yes' if 'torch' in sys.modules else 'no'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
