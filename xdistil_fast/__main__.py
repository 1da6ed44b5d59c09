"""`python -m xdistil_fast`: the same as `xdistil`."""

from __future__ import annotations

from xdistil_fast.cli import entry_point

if __name__ == "__main__":
    entry_point()
