"""Several processes that train one model, one thread each: every one reads its share of a batch, and gradients are averaged.

Threads within one process meet after every operation; processes meet once a step. On a machine that others use, too, that is what
keeps a step from waiting for whichever thread has just lost its core.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

Work = Callable[..., Any]


class Group:
    """The processes of a run. A group of one does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """``rank`` is the number of this process among ``size``."""
        self.rank, self.size = rank, size

    @torch.no_grad()
    def average(self, parameters: list[nn.Parameter], numbers: dict[str, float]) -> dict[str, float]:
        """Replace every gradient by its mean over the processes, and return the means of some numbers."""
        if self.size == 1:
            return numbers
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        sent = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(list(numbers.values()))])
        distributed.all_reduce(sent)
        sent /= self.size
        parts = sent.split([*(gradient.numel() for gradient in gradients), len(numbers)])
        for gradient, part in zip(gradients, parts, strict=False):
            gradient.copy_(part.view_as(gradient))
        return dict(zip(numbers, parts[-1].tolist(), strict=True))


def _member(work: Work, store: str, rank: int, size: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        work(Group(rank, size), *arguments)
    finally:
        distributed.destroy_process_group()


@contextmanager
def _others(work: Work, store: str, size: int, arguments: tuple[Any, ...]) -> Iterator[list[BaseProcess]]:
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_member, args=(work, store, rank, size, arguments)) for rank in range(1, size)]
    for process in others:
        process.start()
    try:
        yield others
    except BaseException:
        for process in others:
            process.terminate()
        raise
    finally:
        for process in others:
            process.join()


def run_together(work: Work, size: int, *arguments: Any) -> None:
    """Call ``work(group, *arguments)`` in ``size`` processes, this one among them.

    Raises:
        RuntimeError: another process failed.
    """
    if size == 1:
        work(Group(), *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        with _others(work, store, size, arguments) as others:
            _member(work, store, 0, size, arguments)
        if any(process.exitcode for process in others):
            raise RuntimeError("one of the training processes failed; its error is above")


__all__ = ["Group", "run_together"]
