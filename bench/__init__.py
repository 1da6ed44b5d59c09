"""Benchmarks: every figure is a ratio to the strongest peers, taken side by side in one run."""
