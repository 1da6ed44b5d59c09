# Everything a developer types. Each target makes what it needs, from python3, pip, g++ and make:
#   make demo     install the core package, tag a few sentences, print entities and tokens/s
#   make test     the tests                     make asan    the kernel tests under sanitizers
#   make lint     style, types, stubs           make isas    the kernel tests per instruction set
#   make emulate  the kernel tests on AVX-512 emulated in AVX2 (needs SIMDe: libsimde-dev)
#   make aarch64  a student on emulated 64-bit ARM (needs g++-aarch64-linux-gnu and qemu-user)
#   make cuda     the extension for GPUs, and a table of its kernels (needs nvcc, no GPU)
#   make format   apply the style               make bench   measure, write docs/BENCHMARKS.md
#       BENCH_ARGS='--corpus FILE --turns 11' are options of the suite; with '-k forward' it
#       measures a part and writes nothing
#   make fuzz     mutated input, FUZZ_ARGS='tokenizer --seconds 600'
#   make clean    builds and caches             make distclean    environments as well
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: demo test lint format bench asan isas emulate cuda aarch64 fuzz clean distclean FORCE

PYTHON ?= python3
VENV ?= .venv
CXX ?= g++
PYTEST_ARGS ?=
# One process of tests a core. PARALLEL= runs them in one, for a debugger.
PARALLEL ?= -n auto
BENCH_ARGS ?=
FUZZ_ARGS ?=

BIN := $(VENV)/bin
ASAN_BIN := $(VENV)-asan/bin
STAMPS := $(VENV)/.stamps
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

CXX_FILES := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
  2>/dev/null)
BUILD_FILES := CMakeLists.txt pyproject.toml constraints.txt $(CXX_FILES)

demo: $(STAMPS)/core
	$(BIN)/python bench/demo.py

# XDF_BUILD_DIR: the objects behind the installed extension, examined for leaked instructions.
test: $(STAMPS)/core $(STAMPS)/test
	tag=$$($(BIN)/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
	XDF_BUILD_DIR=$$(ls -d $(CURDIR)/build/$$tag-*) OMP_NUM_THREADS=1 \
	$(BIN)/pytest $(PARALLEL) --hypothesis-profile=ci $(PYTEST_ARGS)

lint: $(STAMPS)/core $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(call link_package,build/lint)
	ln -sfn $(CURDIR)/bench build/lint/bench
	cd build/lint
	$(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p xdistil_fast -p bench
	$(abspath $(BIN))/stubtest --mypy-config-file $(CURDIR)/pyproject.toml xdistil_fast._core

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(STAMPS)/core $(STAMPS)/bench
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=build/bench.json $(BENCH_ARGS)
	$(BIN)/python -m bench.tables $(if $(filter -k,$(BENCH_ARGS)),--show) build/bench.json
	$(if $(filter -k,$(BENCH_ARGS)),,$(BIN)/python -m bench.plots)

# Python itself is not sanitized, hence the preloads; leaks are the interpreter's and not looked for.
asan: $(STAMPS)/tools $(STAMPS)/asan
	$(call link_package,build/asan/tree)
	export PATH="$(abspath $(BIN)):$$PATH"
	cmake --preset asan -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_CXX_COMPILER=$(CXX)
	cmake --build --preset asan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(CURDIR)/build/asan/tree PYTHONSAFEPATH=1 \
	$(ASAN_BIN)/pytest $(PARALLEL) --hypothesis-profile=ci tests/kernels $(PYTEST_ARGS)

isas: $(STAMPS)/core $(STAMPS)/test
	for isa in $$($(BIN)/python -c 'from xdistil_fast import _core; print(*_core.isas_available())'); do
	  echo "XDF_ISA=$$isa"
	  XDF_ISA=$$isa $(BIN)/pytest --hypothesis-profile=ci tests/kernels $(PYTEST_ARGS)
	done

fuzz: $(STAMPS)/core $(STAMPS)/test
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ_ARGS)

# Instructions in place of AVX-512's own: as exact, but slow.
emulate: $(STAMPS)/tools $(STAMPS)/asan
	if ! echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1; then
	  echo "make emulate: skipped, $(CXX) finds no simde/x86/avx512.h (Debian: libsimde-dev)"; exit 0
	fi
	$(call link_package,build/emulate/tree)
	export PATH="$(abspath $(BIN)):$$PATH"
	cmake --preset emulate -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_CXX_COMPILER=$(CXX)
	cmake --build --preset emulate
	for isa in avx512 avx512vnni avx512bf16; do
	  echo "XDF_ISA=$$isa"
	  XDF_ISA=$$isa PYTHONPATH=$(CURDIR)/build/emulate/tree PYTHONSAFEPATH=1 \
	  $(ASAN_BIN)/pytest --hypothesis-profile=ci tests/kernels $(PYTEST_ARGS)
	done

# Everything is compiled anew: the log of ptxas is what the table is made of. Fails if a kernel spills.
cuda: $(STAMPS)/core
	if ! command -v nvcc >/dev/null; then echo "make cuda: skipped, no nvcc here"; exit 0; fi
	export PATH="$(abspath $(BIN)):$$PATH"
	cmake --preset cuda -DPython_EXECUTABLE=$(abspath $(BIN))/python
	rm -rf build/cuda/CMakeFiles/_cuda.dir/csrc
	cmake --build --preset cuda | tee build/cuda/build.log
	python -m bench.cuda_table build/cuda/build.log -o bench/cuda_kernels.json

aarch64: $(STAMPS)/tools
	for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
	  if ! command -v $$tool >/dev/null; then echo "make aarch64: skipped, no $$tool here"; exit 0; fi
	done
	export PATH="$(abspath $(BIN)):$$PATH"
	cmake --preset aarch64
	cmake --build --preset aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/student_isas

clean:
	rm -rf build dist wheelhouse .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV)-asan

$(STAMPS)/tools: constraints.txt
	@echo "== $(VENV): build tools"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) cmake ninja pybind11 scikit-build-core
	mkdir -p $(STAMPS) && touch $@

# An editable install knows the files that were there when it was made: a new one needs another.
$(STAMPS)/modules: FORCE | $(STAMPS)/tools
	@find xdistil_fast train -type f -not -name '*.pyc' -not -name '*.so' | LC_ALL=C sort > $@.new
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(STAMPS)/core: $(BUILD_FILES) $(STAMPS)/modules | $(STAMPS)/tools
	@echo "== $(VENV): xdistil-fast and what inference needs"
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable .
	touch $@

# Extras come after the core, so that `make demo` never waits for torch. mypy reads bench/ as well.
EXTRAS_test := test,train,data,report
EXTRAS_lint := lint,bench,train,data
EXTRAS_bench := bench,spacy,train
$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/bench: pyproject.toml constraints.txt | $(STAMPS)/core
	@echo "== $(VENV): what make $(@F) needs"
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS_$(@F))]'
	touch $@

$(STAMPS)/asan: constraints.txt | $(STAMPS)/tools
	@echo "== $(VENV)-asan: what the kernel tests need"
	test -x $(ASAN_BIN)/python || $(PYTHON) -m venv $(VENV)-asan
	$(ASAN_BIN)/python $(PIP_INSTALL) hypothesis numpy pytest pytest-xdist tokenizers
	touch $@

# The package as a wheel lays it out, in links: $(1)/xdistil_fast with train/ inside.
define link_package
rm -rf $(1)/xdistil_fast && mkdir -p $(1)/xdistil_fast
for path in xdistil_fast/*; do
  case $$path in */train|*.so|*/__pycache__) ;; *) ln -s $(CURDIR)/$$path $(1)/xdistil_fast/ ;; esac
done
ln -s $(CURDIR)/train $(1)/xdistil_fast/train
endef
