"""Asking about pictures: rows are read, written as prompts and answered, and results are kept in a file.

Commands, batches, evaluations and servers share it.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
