"""Seconds of a prefill's parts: the tower, choosing, merging, and the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import trim_plugin.forward.turn
import trim_plugin.selection.select
from benchmarks.common.device import synchronize
from trim_plugin import KCenter
from trim_plugin.selection.merging import Merging


class Stopwatch:
    """Adds up the seconds of named parts, waiting for the device before and after each."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose seconds count for `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronize(self._device)
            start = time.perf_counter()
            result = work(*args, **kwargs)
            synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return wrapped


@contextlib.contextmanager
def parts_timed(model: Any, watch: Stopwatch) -> Iterator[None]:
    """Within this context a prefill's parts are timed by `watch`."""
    turn, select, tower = trim_plugin.forward.turn, trim_plugin.selection.select, model.model.vision_model
    patches = [
        mock.patch.object(tower, "forward", watch.timed("tower", tower.forward)),
        mock.patch.object(turn, "visual_token_scores", watch.timed("scoring", turn.visual_token_scores)),
        mock.patch.object(select, "merge_dropped", watch.timed("merging", select.merge_dropped)),
        mock.patch.object(Merging, "mean", watch.timed("merging", Merging.mean)),
        mock.patch.object(KCenter, "choose", watch.timed("k-center", KCenter.choose)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def median_seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of `work`, after one call that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return float(torch.tensor(times).median())
