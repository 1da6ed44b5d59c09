"""Choice of the instruction set, and that no instruction leaks out of its object file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from xdistil_fast import _core

ISAS = ["generic", "avx2", "avx512", "avx512vnni", "avx512bf16", "neondot"]


def python(code: str, xdf_isa: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds the package where this one found it."""
    environment = {key: value for key, value in os.environ.items() if key != "XDF_ISA"}
    if xdf_isa is not None:
        environment["XDF_ISA"] = xdf_isa
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


SHOW = "from xdistil_fast import _core; print(_core.active_isa())"


def test_names() -> None:
    compiled, available = _core.isas_compiled(), _core.isas_available()
    assert compiled[0] == available[0] == "generic"
    assert [name for name in ISAS if name in compiled] == compiled
    assert [name for name in compiled if name in available] == available
    assert _core.active_isa() in available


@pytest.mark.parametrize("xdf_isa", [None, ""])
def test_default_is_the_best_available(xdf_isa: str | None) -> None:
    done = python(SHOW, xdf_isa)
    assert done.stdout.strip() == _core.isas_available()[-1], done.stderr


@pytest.mark.parametrize("name", _core.isas_available())
def test_environment_forces_one(name: str) -> None:
    done = python(SHOW, name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("name", _core.isas_available())
def test_a_forced_one_computes(name: str) -> None:
    code = (
        "import numpy as np\n"
        "from xdistil_fast import _core\n"
        "x = np.eye(3, 5, dtype=np.float32); w = np.arange(35, dtype=np.float32).reshape(7, 5)\n"
        "out = np.empty((3, 7), np.float32); _core.linear(_core.LinearWeights(w), x, out)\n"
        "assert (out == w.T[:3]).all(), out"
    )
    done = python(code, name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["avx9", "AVX2", " generic"])
def test_unknown_name_in_the_environment(name: str) -> None:
    done = python(SHOW, name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError: ", "RuntimeError: ")), last
    assert "XDF_ISA" in last
    assert f"'{name}'" in last
    assert ", ".join(_core.isas_available()) in last


def unavailable() -> list[str]:
    return [name for name in _core.isas_compiled() if name not in _core.isas_available()]


@pytest.mark.skipif(not unavailable(), reason="this machine supports every compiled set")
def test_compiled_but_unavailable_name_in_the_environment() -> None:
    for name in unavailable():
        done = python(SHOW, name)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(("ImportError: ", "RuntimeError: ")), last
        assert "does not support" in last
        assert f"'{name}'" in last
        assert ", ".join(_core.isas_available()) in last


def test_set_isa() -> None:
    before = _core.active_isa()
    try:
        for name in _core.isas_available():
            _core.set_isa(name)
            assert _core.active_isa() == name
        for name in ["avx9", "", *unavailable()]:
            with pytest.raises(ValueError, match=f"set_isa: .*'{name}'.*generic"):
                _core.set_isa(name)
            assert _core.active_isa() == _core.isas_available()[-1]
    finally:
        _core.set_isa(before)


def test_levels_agree() -> None:
    # Not to the bit: the width of a register sets which products are fused. To rounding.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 100), dtype=np.float32)
    weight = rng.standard_normal((33, 100), dtype=np.float32)
    before = _core.active_isa()
    results = []
    try:
        for name in _core.isas_available():
            _core.set_isa(name)
            out = np.empty((50, 33), dtype=np.float32)
            _core.linear(_core.LinearWeights(weight), x, out)
            results.append(out)
    finally:
        _core.set_isa(before)
    for out in results[1:]:
        np.testing.assert_allclose(out, results[0], rtol=1e-4, atol=1e-4)


def object_files() -> dict[str, Path]:
    """Per-ISA object files of the build named by XDF_BUILD_DIR."""
    build = os.environ.get("XDF_BUILD_DIR")
    if not build:
        pytest.skip("XDF_BUILD_DIR names no CMake build folder whose objects could be examined")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    found = {}
    for isa in _core.isas_compiled():
        files = sorted(Path(build).glob(f"**/xdf_kernels_{isa}.dir/**/*.o"))
        assert len(files) == 1, f"{build}: object files of {isa}: {files}"
        found[isa] = files[0]
    return found


def test_objects_export_only_their_table() -> None:
    for isa, path in object_files().items():
        listing = subprocess.run(
            ["nm", "--demangle", "--extern-only", "--defined-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if line.strip()]
        names = sorted(name for _, name in symbols)
        # A weak or unique symbol (W, V, u) might be the copy the linker keeps for everybody, with
        # instructions that another machine does not have.
        assert {kind for kind, _ in symbols} <= {"R", "D"}, symbols
        # Double is the reference precision: one table of it is enough.
        tables = ["table_double"] if isa == "generic" else []
        tables += ["table_bf16"] if isa == "avx512bf16" else []
        tables += ["table_float", "table_inference"]
        assert names == [f"xdf::{isa}::{table}" for table in tables]


def test_objects_need_nothing_of_the_standard_library() -> None:
    for isa, path in object_files().items():
        listing = subprocess.run(
            ["nm", "--demangle", "--undefined-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        needed = [line.split(maxsplit=1)[1] for line in listing.splitlines() if line.strip()]
        assert not [name for name in needed if "std::" in name or "operator new" in name], isa


# Sums of products by floats, in the functions that are made of them, and by bytes, anywhere.
_FLOAT_PRODUCT = re.compile(r"(vfmadd\w+|vdpbf16)ps\b")
_BYTE_PRODUCT = re.compile(r"(vpmaddubsw|vpdpbusd)\b")
_OF_FLOATS = re.compile(r"<\w*(gemm_tile|lstm_tile|lstm_few_rows)")
_SPILL = re.compile(r"v?mov\w+\s+%[yz]mm\d+,.*\(%r[sb]p")
_BACKWARD = re.compile(r"j\w+\s+([0-9a-f]+)")


def product_loops(listing: str) -> Iterator[list[str]]:
    """Innermost loops of a disassembly that do at least eight vector products."""
    for function in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        product = _FLOAT_PRODUCT if _OF_FLOATS.search(function) else _BYTE_PRODUCT
        found = re.findall(r"^\s+([0-9a-f]+):\s+(.+)$", function, re.MULTILINE)
        places = {int(address, 16): index for index, (address, _) in enumerate(found)}
        for index, (_, text) in enumerate(found):
            jump = _BACKWARD.match(text)
            begin = places.get(int(jump[1], 16), index + 1) if jump else index + 1
            body = [text for _, text in found[begin : index + 1]]
            nested = any(
                places.get(int(inner[1], 16), -1) in range(begin, begin + at)
                for at, text in enumerate(body[:-1])
                if (inner := _BACKWARD.match(text))
            )
            # Code for rare cases stands behind the function's end and jumps back into it.
            whole = not any(text.startswith(("ret", "jmp")) for text in body)
            if whole and not nested and sum(bool(product.match(text)) for text in body) >= 8:
                yield body


@pytest.mark.parametrize("isa", [isa for isa in _core.isas_compiled() if isa.startswith("avx")])
def test_product_loops_keep_their_sums_in_registers(isa: str) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    path = object_files()[isa]
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "__asan" in listing:
        pytest.skip("built with sanitizers, which need registers of their own")
    loops = list(product_loops(listing))
    assert len(loops) > 20
    spilled = [body for body in loops if any(_SPILL.match(text) for text in body)]
    assert not spilled, "\n".join(spilled[0])
