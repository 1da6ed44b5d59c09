"""The sub-commands that need no torch."""
