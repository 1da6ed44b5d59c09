"""The optional extension `_cuda`: imported when first asked for, with a reason where it cannot be.

Nothing of it is loaded, and no GPU touched, unless something is asked to run on one.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any


class DeviceError(RuntimeError):
    """What is asked for runs on no GPU here; the message says why and what to do."""


# Of the drivers' version number, 1000 major + 10 minor.
_MAJOR = 1000


def _version_text(number: int) -> str:
    return f"{number // _MAJOR}.{number % _MAJOR // 10}"


@functools.lru_cache(maxsize=1)
def cuda() -> Any:
    """The extension `_cuda`.

    Raises:
        DeviceError: it was not built or does not load; the message says what to do.
    """
    try:
        return importlib.import_module("xdistil_fast._cuda")
    except ModuleNotFoundError:
        raise DeviceError(
            "this xdistil-fast was built without CUDA; build it where nvcc is, with "
            "`pip install . -C cmake.define.XDF_CUDA=ON`, or use device='cpu'"
        ) from None
    except ImportError as error:
        raise DeviceError(f"the CUDA extension of xdistil-fast does not load: {error}") from error


@functools.lru_cache(maxsize=64)
def device_info(device: int) -> dict[str, Any]:
    """What a GPU can do.

    Args:
        device: its number, from 0.

    Returns:
        Its `name`, `compute_capability`, `processors`, `shared_memory` (bytes a block may have),
        `max_cluster`, `total_memory` and `free_memory` (bytes, at the first call).

    Raises:
        DeviceError: no extension, no driver, a driver or a GPU that is too old.
        ValueError: there is no such device.
    """
    extension = cuda()
    driver, runtime = extension.driver_version(), extension.runtime_version()
    if runtime and driver == 0:
        raise DeviceError("device='cuda' needs an NVIDIA driver; there is none on this machine")
    if driver // _MAJOR < runtime // _MAJOR:
        raise DeviceError(
            f"the NVIDIA driver is for CUDA {_version_text(driver)}, this extension was built "
            f"with CUDA {_version_text(runtime)}: it needs a newer driver, or a build with an "
            "older CUDA"
        )
    try:
        info: dict[str, Any] = extension.device_info(device)
    except RuntimeError as error:  # CUDA cannot start, or sees no device at all
        raise DeviceError(f"device='cuda' does not run here: {error}") from None
    if info["compute_capability"] < (8, 0):
        major, minor = info["compute_capability"]
        raise DeviceError(
            f"GPU {device}, {info['name']}, has compute capability {major}.{minor}; "
            "xdistil-fast needs 8.0 (Ampere) or later"
        )
    return info


@functools.lru_cache(maxsize=1024)
def lstm_plan(
    kind: str,
    backward: bool,
    hidden_size: int,
    batch: int,
    device: int,
    rows: int = 0,
    cluster: int = 0,
) -> Any:
    """How the recurrence runs on a device: sequences of a tile, blocks of a cluster, and so on.

    Args:
        kind: "float32", "float64", "bfloat16", or "int8", which has no backward pass.
        backward: which pass.
        hidden_size: H.
        batch: number of sequences.
        device: number of the GPU.
        rows: sequences of a tile (8, 16 or 32) instead of the best; 0: choose.
        cluster: blocks of a tile (1, 2, 4, 8 or 16) instead of the best; 0: choose.

    Returns:
        A plan for `lstm_forward` or `lstm_backward`. No result depends on which.

    Raises:
        ValueError: no plan fits the device.
    """
    info = device_info(device)
    return cuda().lstm_plan(
        kind,
        backward,
        hidden_size,
        batch,
        info["processors"],
        info["shared_memory"],
        info["max_cluster"],
        rows,
        cluster,
    )


def cuda_report() -> dict[str, Any]:
    """What `xdistil doctor` says about CUDA: the GPUs, or why there are none."""
    try:
        extension = cuda()
    except RuntimeError as error:
        return {"extension": "no", "reason": str(error)}
    report: dict[str, Any] = {
        "extension": "built with CUDA " + _version_text(extension.runtime_version()),
        "driver": _version_text(extension.driver_version()) if extension.driver_version() else None,
    }
    try:
        for device in range(extension.device_count()):
            info = device_info(device)
            major, minor = info["compute_capability"]
            report[f"GPU {device}"] = (
                f"{info['name']}, compute capability {major}.{minor}, "
                f"{info['processors']} processors, {info['total_memory'] / 1e9:.0f} GB"
            )
    except (RuntimeError, ValueError) as error:
        report["reason"] = str(error)
    return report
