"""Questions that are answered many at once, by an engine."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trim_plugin.batching.worker import RowsFail, Worker
from trim_plugin.evaluation.log import Answer, pack_kept
from trim_plugin.evaluation.peaks import peak_bytes, reset_peaks
from trim_plugin.evaluation.questions import Question
from trim_plugin.variants import Variant


def answers_together(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    variant: Variant,
    *,
    max_new_tokens: int,
    max_running: int,
    memory: int | None,
) -> Iterator[Answer]:
    """Answer as they fit, and give the answers as they end. A picture that several questions ask about is encoded once.

    The variant's wall-clock time is shared out: at any time each of the questions that are being answered takes as much of it.
    Those that have waited longest are. If one question fails like the other (`RowsFail`), that is the error of all that are left.

    Raises:
        ValueError: the model or the variant is one that an `Engine` cannot have; it cannot have stock.
        torch.AcceleratorError, EngineClosed: as for `Worker.answers`.
    """
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        reset_peaks()
    since = time.perf_counter()
    worker = Worker(
        model,
        processor,
        variant.config,
        max_running=max_running,
        memory=memory,
        max_new_tokens=max_new_tokens,
        tell_held=True,
    )
    #: The places of questions without an answer, in order, and how much of the time each has taken.
    left = dict.fromkeys(range(len(questions)), 0.0)
    with contextlib.closing(worker):
        try:
            for found in worker.answers([question.row for question in questions]):
                now = time.perf_counter()
                running = list(itertools.islice(left, max_running))
                for place in running:
                    left[place] += (now - since) / len(running)
                since = now
                for place, result in found:
                    made = {"error": result["error"]} if "error" in result else _made(result)
                    made |= {"seconds": left.pop(place), "at_once": max_running}
                    yield Answer.of(questions[place], variant, peak_bytes=peak_bytes() if on_gpu else 0, **made)
        except RowsFail as error:  # this variant's failure: another may have answers
            for place in left:
                yield Answer.of(questions[place], variant, error=str(error))


def _made(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker's result says of an answer, its time aside."""
    held = result["held"]
    return {
        "text": result["answer"],
        "new_tokens": result["tokens"],
        "visible_tokens": result["visible"],
        "kept_tokens": result["kept"],
        "cross_kv_bytes": held.cross_kv_bytes,
        "stock_cross_kv_bytes": held.stock_cross_kv_bytes,
        "kept": pack_kept(held.kept_indices, held.total_tokens),
    }
