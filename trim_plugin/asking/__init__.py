"""Asking about pictures: a row, what `generate` gets of it, what comes back, and where that is kept.

Commands, batches, evaluations and servers share it.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
