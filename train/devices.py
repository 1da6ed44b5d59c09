"""Where torch works, and what it is good at there."""

from __future__ import annotations

import torch


def pick_device(device: str) -> torch.device:
    """``auto`` or a torch device name as a device (ValueError where there is none such)."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device is {device!r}, which torch refuses ({reason})") from None
    return chosen


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done in hardware there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Not public, so they may go; the answer is then the slower, exact way.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False
