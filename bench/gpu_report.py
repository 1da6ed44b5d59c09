"""One visit to a GPU: builds the extension, tests it, measures it, writes one JSON and one log.

    python bench/gpu_report.py [-o DIR] [--minutes 9] [--skip-build] [--skip-tests]

For a bare machine with nvcc, a C++ compiler, CMake, ninja, pybind11, PyTorch with CUDA,
transformers and pytest; no network and no installation. pytorch-crf is not needed, a padded CRF in
torch stands for it. Sections follow one another while time is left; one that fails is recorded,
with its error, and the next one runs. After each section the JSON is written anew, so whatever
stops the script, what was measured is there.

Times are medians over repeated CUDA-event timings, with quartiles. Every rival is compared with our
output before it is timed, and where CUDA graphs apply, both sides run in one.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of bench/

from bench import gpu_models as models  # noqa: E402
from bench.gpu_clock import Clock, Report  # noqa: E402

_GPU_TESTS = (
    "gpu", "lstm", "int8", "crf", "rows", "student", "classifier", "devices", "training",
)  # fmt: skip

OURS = ("float32", "bfloat16", "int8")
THEIRS = ("float32", "bfloat16", "float16")


# --- build and tests ---------------------------------------------------------------------------


def build(report: Report) -> dict[str, Any]:
    """Both extensions, into the source tree, for this GPU alone (the others cost minutes)."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if major == 9 else f"{major}{minor}" if major == 8 else "90-virtual"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    configure = ["cmake", "--preset", "cuda", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    configure.append("-DXDF_WERROR=OFF")  # another compiler may warn of other things
    report.command(configure, 90)
    built = report.command(
        ["cmake", "--build", str(ROOT / "build" / "cuda"), "--parallel", str(os.cpu_count() or 1)],
        240,
    )
    return {"architecture": architecture, "tail": built[-400:]}


def tests(report: Report) -> dict[str, Any]:
    """tests/cuda on the GPU."""
    tail = report.command(
        [sys.executable, "-m", "pytest", *(f"tests/cuda/test_{name}.py" for name in _GPU_TESTS),
         "-q", "-k", "not emulated", "-p", "no:cacheprovider", "--tb=short"],
        150,
        PYTHONPATH=str(report.folder / "tree"),
        PYTHONSAFEPATH="1",
    )  # fmt: skip
    return {"passed": True, "summary": tail.splitlines()[-1]}


def link_package(folder: Path) -> None:
    """The package as a wheel lays it out, in links."""
    package = folder / "tree" / "xdistil_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "xdistil_fast").iterdir():
        if path.name not in ("train", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "train").symlink_to(ROOT / "train")


# --- sections ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What this was measured on."""
    import torch

    from xdistil_fast import _backend

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True,
            check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cudnn"] = str(torch.backends.cudnn.version())
    if importlib.util.find_spec("transformers"):
        import transformers

        versions["transformers"] = transformers.__version__
    return {
        "gpu": torch.cuda.get_device_name(),
        "device": _backend.device_info(0),
        "driver": _backend.cuda().driver_version(),
        "cuda": _backend.cuda().runtime_version(),
        "versions": versions,
        "commit": commit,
    }


def inference(report: Report, clock: Clock) -> dict[str, Any]:
    """Ids to scores: ours against the best of cuDNN's three precisions."""
    import torch

    out: dict[str, Any] = {}
    for name, (input_size, hidden) in models.STUDENTS.items():
        for shape in models.ALL_SHAPES:
            if report.left() < 100:
                out[f"{name}, {shape}"] = {"left_out": "no time"}
                continue
            report.say(f"  {name}, {shape}")
            student = models.Student(input_size, hidden, shape)
            entry: dict[str, Any] = {"tokens": student.total}
            out[f"{name}, {shape}"] = entry
            exact = models.TheirScores(student, "float32")()
            rows = torch.cat([exact[:n, b] for b, n in enumerate(student.lengths)]).float()
            best = {"ours": float("inf"), "theirs": float("inf")}
            for precision in OURS:
                try:
                    run = models.OurScores(student, precision)
                except ValueError as error:
                    entry[f"ours {precision}"] = {"error": str(error)}
                    continue
                # A padded reverse direction starts in the padding: only whole batches compare.
                if shape in models.SHAPES:
                    entry[f"error {precision}"] = float((run() - rows).abs().max())
                spent = clock.both(f"ours {precision}", run, entry)
                if precision == "int8":  # rounded weights: for no rival here, so by itself
                    entry["int8 tokens/s"] = round(1e6 * student.total / spent)
                else:
                    best["ours"] = min(best["ours"], spent)
                entry[f"plan {precision}"] = [run.plan.rows, run.plan.cluster, run.plan.resident]
            for precision in THEIRS:
                theirs = models.TheirScores(student, precision)
                spent = clock.both(f"cuDNN {precision}", theirs, entry)
                best["theirs"] = min(best["theirs"], spent)
            entry["times as fast"] = round(best["theirs"] / best["ours"], 2)
            entry["tokens/s"] = round(1e6 * student.total / best["ours"])
            report.say(f"   => {entry['times as fast']}x, {entry['tokens/s']:,} tokens/s")
            report.save()
    return out


def classes(report: Report, clock: Clock) -> dict[str, Any]:
    """Classifiers: ids to scores of texts, and a training step; theirs pool padded states."""
    import torch

    from xdistil_fast import torch_ops

    out: dict[str, Any] = {}
    cross_entropy = torch.nn.functional.cross_entropy
    for shape in ("32x128", "ragged 512"):
        for pooling in ("max", "mean", "last"):
            if report.left() < 60:
                out[f"{pooling}, {shape}"] = {"left_out": "no time"}
                continue
            student = models.Student(*models.STUDENTS["E50 H200"], shape)
            entry: dict[str, Any] = {"tokens": student.total}
            out[f"{pooling}, {shape}"] = entry
            exact = models.TheirScores(student, "float32", pooling)()
            ours = theirs = float("inf")
            for precision in OURS:
                run = models.OurScores(student, precision, pooling=pooling)
                if shape in models.SHAPES:
                    entry[f"error {precision}"] = float((run() - exact).abs().max())
                spent = clock.both(f"ours {precision}", run, entry)
                ours = ours if precision == "int8" else min(ours, spent)
            for precision in THEIRS:
                rival = models.TheirScores(student, precision, pooling)
                theirs = min(theirs, clock.both(f"cuDNN {precision}", rival, entry))
            entry["times as fast"] = round(theirs / ours, 2)
            leaves = [*student.weights, *student.linear.parameters()]
            values = student.embedding[student.ids]
            padded, mask = student.padded(values), student.mask()
            labels = student.tags[: len(student.lengths)]

            def our_step(
                student: Any = student, values: Any = values, leaves: Any = leaves,
                labels: Any = labels, pooling: str = pooling,
            ) -> Any:  # fmt: skip
                hidden = torch_ops.bilstm(values, student.cu_seqlens, student.weights)
                pooled = torch_ops.pool(hidden, student.cu_seqlens, pooling)
                return torch.autograd.grad(cross_entropy(student.linear(pooled), labels), leaves)

            def their_step(
                student: Any = student, padded: Any = padded, mask: Any = mask,
                leaves: Any = leaves, labels: Any = labels, pooling: str = pooling,
            ) -> Any:  # fmt: skip
                hidden, _ = student.lstm(padded)
                pooled = models.pool_padded(hidden, mask, pooling)
                return torch.autograd.grad(cross_entropy(student.linear(pooled), labels), leaves)

            if shape in models.SHAPES:
                entry["largest difference of gradients"] = max(
                    float((a - b).abs().max())
                    for a, b in zip(our_step(), their_step(), strict=True)
                )
            mine = clock.both("ours, training step", our_step, entry)
            entry["cuDNN, training step, eager"] = clock.time(their_step, 0.3)
            eager = float(entry["cuDNN, training step, eager"]["median_us"])
            entry["training, times as fast as eager"] = round(eager / mine, 2)
            report.save()
    return out


def plans(report: Report, clock: Clock) -> dict[str, Any]:
    """All plans side by side: what lstm_plan.h estimates, against what is."""
    out: dict[str, Any] = {}
    for name in ("E50 H200", "E300 H600"):
        for shape in ("32x32", "512x128"):
            if report.left() < 90:
                break
            student = models.Student(*models.STUDENTS[name], shape)
            entry: dict[str, Any] = {}
            out[f"{name}, {shape}"] = entry
            for rows in (8, 16, 32):
                for cluster in (1, 2, 4, 8, 16):
                    try:
                        run = models.OurScores(student, "bfloat16", rows, cluster)
                    except ValueError:
                        continue  # does not fit
                    key = f"{rows} rows, cluster {cluster}"
                    clock.both(key, run, entry)
                    entry[key]["estimated_cycles"] = run.plan.cycles
                    entry[key]["resident"] = run.plan.resident
    return out


def crf(report: Report, clock: Clock) -> dict[str, Any]:
    """CRF alone: loss and gradient, Viterbi; against the same in torch, padded, in a graph."""
    import torch

    from xdistil_fast import torch_ops

    out: dict[str, Any] = {}
    for shape in ("32x32", "32x128", "512x128"):
        batch, length = models.SHAPES[shape]
        torch.manual_seed(1)
        leaves = [
            torch.randn(size, device=models.DEVICE, requires_grad=True)
            for size in (
                (batch * length, models.NUM_TAGS),
                (models.NUM_TAGS,),
                (models.NUM_TAGS,),
                (models.NUM_TAGS,) * 2,
            )
        ]
        tags = torch.randint(models.NUM_TAGS, (batch * length,), device=models.DEVICE)
        offsets = torch.arange(batch + 1, device=models.DEVICE, dtype=torch.int32) * length

        def ours(leaves: Any = leaves, offsets: Any = offsets, tags: Any = tags) -> Any:
            loss = -torch_ops.crf_log_likelihood(leaves[0], offsets, tags, *leaves[1:]).sum()
            return torch.autograd.grad(loss, leaves)

        mask = torch.ones((length, batch), dtype=torch.bool, device=models.DEVICE)

        def theirs(
            leaves: Any = leaves, tags: Any = tags, mask: Any = mask, shape: Any = (batch, length)
        ) -> Any:
            emissions = leaves[0].view(*shape, models.NUM_TAGS).transpose(0, 1)
            loss = models.padded_crf_loss(emissions, tags.view(shape).t(), mask, leaves[1:])
            return torch.autograd.grad(loss, leaves)

        entry: dict[str, Any] = {}
        out[shape] = entry
        entry["largest difference of gradients"] = max(
            float((a - b).abs().max()) for a, b in zip(ours(), theirs(), strict=True)
        )
        mine = clock.both("ours, loss and gradient", ours, entry)
        entry["torch eager"] = clock.time(theirs, 1.0)
        graphed = clock.both("torch in a CUDA graph", theirs, entry)
        entry["times as fast as torch eager"] = round(entry["torch eager"]["median_us"] / mine, 1)
        entry["times as fast as torch in a graph"] = round(graphed / mine, 1)
        scores = [leaf.detach() for leaf in leaves]
        clock.both(
            "ours, Viterbi",
            functools.partial(torch_ops.crf_viterbi, scores[0], offsets, *scores[1:]),
            entry,
        )
        report.say(f"   => {entry['times as fast as torch eager']}x eager")
    return out


def training(report: Report, clock: Clock) -> dict[str, Any]:
    """A step of BiLSTM-CRF: loss and all gradients; ours ragged, theirs padded."""
    import torch

    from xdistil_fast import torch_ops

    out: dict[str, Any] = {}
    for name, (input_size, hidden) in models.STUDENTS.items():
        for shape in ("32x32", "32x128", "ragged 32"):
            if report.left() < 60:
                out[f"{name}, {shape}"] = {"left_out": "no time"}
                continue
            report.say(f"  {name}, {shape}")
            student = models.Student(input_size, hidden, shape)
            crf_scores = [
                torch.randn(size, device=models.DEVICE, requires_grad=True)
                for size in (
                    (models.NUM_TAGS,),
                    (models.NUM_TAGS,),
                    (models.NUM_TAGS, models.NUM_TAGS),
                )
            ]
            leaves = [*student.weights, *student.linear.parameters(), *crf_scores]
            values = student.embedding[student.ids]

            def ours(
                dtype: Any, student: Any = student, values: Any = values, crf: Any = crf_scores,
                leaves: Any = leaves,
            ) -> Any:  # fmt: skip
                with torch.autocast(models.DEVICE, torch.bfloat16, dtype == torch.bfloat16):
                    hidden = torch_ops.bilstm(values, student.cu_seqlens, student.weights)
                    scores = student.linear(hidden.float())
                loss = -torch_ops.crf_log_likelihood(
                    scores.float(), student.cu_seqlens, student.tags, *crf
                ).sum()
                return torch.autograd.grad(loss, leaves)

            padded, gold = student.padded(values), student.padded(student.tags)
            mask = student.mask()

            def theirs(
                dtype: Any, student: Any = student, padded: Any = padded, crf: Any = crf_scores,
                leaves: Any = leaves, gold: Any = gold, mask: Any = mask,
            ) -> Any:  # fmt: skip
                with torch.autocast(models.DEVICE, dtype, dtype != torch.float32):
                    hidden, _ = student.lstm(padded)
                    scores = student.linear(hidden)
                loss = models.padded_crf_loss(scores.float(), gold, mask, crf)
                return torch.autograd.grad(loss, leaves)

            entry: dict[str, Any] = {"tokens": student.total}
            out[f"{name}, {shape}"] = entry
            if shape in models.SHAPES:
                for a, b in zip(ours(torch.float32), theirs(torch.float32), strict=True):
                    scale = float(b.abs().max())
                    error = float((a - b).abs().max()) / max(scale, 1e-6)
                    entry["largest relative difference"] = max(
                        error, entry.get("largest relative difference", 0.0)
                    )
            mine = min(
                clock.both("ours float32", lambda: ours(torch.float32), entry),
                clock.both("ours bfloat16", lambda: ours(torch.bfloat16), entry),
            )
            eager = float("inf")
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                key = f"nn.LSTM + torch CRF, eager {str(dtype).removeprefix('torch.')}"
                try:
                    entry[key] = clock.time(functools.partial(theirs, dtype), 0.6)
                    eager = min(eager, entry[key]["median_us"])
                except RuntimeError as error:
                    entry[key] = {"error": str(error)[:300]}
            graphed = clock.both("nn.LSTM + torch CRF, graph", lambda: theirs(torch.float32), entry)
            entry["times as fast as eager"] = round(eager / mine, 2)
            entry["times as fast as in a graph"] = round(graphed / mine, 2)
            report.say(f"   => {entry['times as fast as eager']}x eager")
            report.save()
    return out


@contextmanager
def no_gradients() -> Iterator[None]:
    """Inference mode, imported late."""
    import torch

    with torch.inference_mode():
        yield


def teacher(report: Report, clock: Clock) -> dict[str, Any]:
    """An mBERT-size model of random weights in its best runtimes, and the student beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    out: dict[str, Any] = {}
    config = transformers.BertConfig(vocab_size=119_547)
    config.num_labels = models.NUM_TAGS
    for shape in ("32x32", "32x128"):
        batch, length = models.SHAPES[shape]
        entry: dict[str, Any] = {}
        out[shape] = entry
        ids = torch.randint(119_547, (batch, length), device=models.DEVICE)
        student = models.Student(50, 200, shape)
        ours = clock.both("student E50 H200 bfloat16", models.OurScores(student, "bfloat16"), entry)
        best = float("inf")
        runs = [("float32 eager", "eager", torch.float32, False)]
        runs += [("bfloat16 SDPA", "sdpa", torch.bfloat16, True)]
        for name, attention, dtype, graph in runs:
            model = transformers.BertForTokenClassification._from_config(
                config, attn_implementation=attention
            )
            model = model.to(models.DEVICE, dtype).eval()

            def run(model: Any = model, ids: Any = ids) -> Any:
                with no_gradients():
                    return model(input_ids=ids).logits

            try:
                entry[name] = clock.time(run, 1.0)
                report.say(f"   {name}: {entry[name]['median_us']} us")
                if graph:
                    best = clock.both(f"{name}, CUDA graph", run, entry)
                    if shape == "32x32" and report.left() > 120:
                        compiled = torch.compile(model, dynamic=False)
                        best = min(
                            best,
                            clock.both(
                                f"{name}, torch.compile, CUDA graph",
                                functools.partial(run, compiled, ids),
                                entry,
                            ),
                        )
            except Exception as error:
                entry[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
                report.say(f"   {name}: {entry[name]['error']}")
            del model
            torch.cuda.empty_cache()
        if "median_us" in entry.get("float32 eager", {}):
            spent = entry["float32 eager"]["median_us"]
            entry["times as fast as float32 eager"] = round(spent / ours, 1)
        entry["times as fast as the best"] = round(best / ours, 1)
        report.save()
    saturated = models.Student(50, 200, "512x128")
    entry = {}
    spent = clock.both("student", models.OurScores(saturated, "bfloat16"), entry)
    entry["tokens/s"] = round(1e6 * saturated.total / spent)
    best_teacher = min(
        (
            value["median_us"] / (32 * 128)
            for key, value in out.get("32x128", {}).items()
            if isinstance(value, dict) and "median_us" in value and "student" not in key
        ),
        default=float("inf"),
    )
    entry["times the best teacher's tokens/s at 32x128"] = round(
        best_teacher * saturated.total / spent, 1
    )
    out["saturation, 512x128"] = entry
    return out


def main(arguments: list[str]) -> int:
    """Runs the script; 0 if all sections came to their end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-report"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args(arguments)
    report = Report(args.output.resolve(), args.minutes - 0.2)
    report.say(f"writing to {report.folder}")
    done = True
    if not args.skip_build:
        done &= report.section("build", 60, lambda: build(report))
    try:
        link_package(report.folder)
    except OSError as error:
        report.say(f"cannot link the package: {error}")
        return 1
    sys.path.insert(0, str(report.folder / "tree"))
    clock = Clock(report)
    done &= report.section("machine", 5, machine)
    if not args.skip_tests:
        done &= report.section("tests", 60, lambda: tests(report))
    done &= report.section("teacher", 60, lambda: teacher(report, clock))
    done &= report.section("inference", 60, lambda: inference(report, clock))
    done &= report.section("crf", 30, lambda: crf(report, clock))
    done &= report.section("training", 45, lambda: training(report, clock))
    done &= report.section("classes", 45, lambda: classes(report, clock))
    done &= report.section("plans", 60, lambda: plans(report, clock))
    report.say(f"done, {report.left():.0f} s left: {report.folder / 'gpu_report.json'}")
    report.close()
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
