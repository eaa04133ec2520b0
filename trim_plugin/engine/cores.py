"""A CPU's cores for the thread that owns the model."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

#: OpenMP 5's `omp_pause_soft`: let threads go, keep settings.
PAUSE_SOFT = 1


def release_idle_workers() -> None:
    """End the workers that OpenMP keeps for the calling thread; its next operation gets new ones.

    Torch computes on a CPU with a team of OpenMP threads for every Python thread that calls it. GNU's OpenMP counts the threads
    of all teams. Once there are more than cores, workers go to sleep as soon as they have nothing to do, and every operation has
    to wake them: a decoding step of the engine took 1.5 times as long while the main thread, which had loaded the model, kept an
    idle team (two cores; `benchmarks/throughput`). Other kinds of OpenMP are left alone.
    """
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        with contextlib.suppress(OSError, AttributeError):  # not loaded so, or older than OpenMP 5
            ctypes.CDLL(str(library)).omp_pause_resource_all(PAUSE_SOFT)
