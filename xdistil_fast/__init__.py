"""Tag text with small BiLSTM(-CRF) students distilled from large models, in compiled code."""

from __future__ import annotations
