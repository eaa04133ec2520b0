"""Plots as files; no screen is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def save(figure: Any, path: Path) -> Path:
    """Write a figure and forget it; returns the file."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path
