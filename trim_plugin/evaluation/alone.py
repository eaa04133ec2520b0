"""Questions that are answered one at a time, so that what each takes is its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trim_plugin.asking import answers
from trim_plugin.asking.answers import Inputs, tried
from trim_plugin.asking.prompts import decoded, read_prompt
from trim_plugin.evaluation.log import Answer, pack_kept
from trim_plugin.evaluation.peaks import peak_bytes, reset_peaks
from trim_plugin.evaluation.questions import Question
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.variants import Variant


def answers_alone(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    *,
    max_new_tokens: int,
    is_done: Callable[[Question, Variant], bool],
) -> Iterator[Answer]:
    """Answer with `generate`, question by question, each with all variants.

    Args:
        model, processor, max_new_tokens: as for `evaluate`.
        questions: to be answered.
        variants: how to answer each.
        is_done: whether there is an answer already.

    Raises:
        torch.AcceleratorError, OSError: as for `tried`.
    """
    most = model.config.get_text_config().max_position_embeddings
    warm: set[str] = set()
    for question in questions:
        missing = [variant for variant in variants if not is_done(question, variant)]
        if not missing:
            continue
        length = question.max_new_tokens or max_new_tokens
        try:
            prompt = read_prompt(processor, question.row, Path(), most, length)
            inputs = Inputs.of(processor, [prompt.text], [[decoded(picture) for picture in prompt.pictures]])
        except ValueError as error:
            for variant in missing:
                yield Answer.failed(question, variant, str(error))
            continue
        for variant in missing:
            if variant.name not in warm:  # the first generation pays for allocations and kernels: not timed
                _timed(model, processor, question, variant, inputs, length)
                warm.add(variant.name)
            yield _timed(model, processor, question, variant, inputs, length)


def _timed(
    model: Any, processor: Any, question: Question, variant: Variant, inputs: Inputs, max_new_tokens: int
) -> Answer:
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        reset_peaks()
    found, error = tried(lambda: answers.answer(model, processor, inputs, variant.config, max_new_tokens))
    if found is None:
        return Answer.failed(question, variant, error)
    (own,), cache = found
    made = dataclasses.replace(
        Answer.blank(question, variant),
        text=own.text.strip(),
        seconds=own.seconds,
        new_tokens=own.tokens,
        peak_bytes=peak_bytes() if on_gpu else 0,
    )
    if not isinstance(cache, TrimmedCache):
        return made
    report = cache.report()
    return dataclasses.replace(
        made,
        visible_tokens=report.visible_tokens[0],
        kept_tokens=report.kept_tokens[0],
        cross_kv_bytes=report.cross_kv_bytes,
        stock_cross_kv_bytes=report.stock_cross_kv_bytes,
        kept=pack_kept(cache.kept_indices[0].tolist(), report.total_tokens[0]),
    )
