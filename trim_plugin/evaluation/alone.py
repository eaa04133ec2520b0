"""Questions that are answered one at a time, so that what each takes is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trim_plugin.asking.answers import OF_ALL, Inputs, answer, told
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
    """Answer with `generate`, question by question, each with all variants that have no answer already.

    Raises:
        torch.AcceleratorError, OSError: `asking.answers.OF_ALL`.
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
                yield Answer.of(question, variant, error=str(error))
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
    try:
        (own,), cache = answer(model, processor, inputs, variant.config, max_new_tokens)
    except OF_ALL:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises for one question, others can be answered
        return Answer.of(question, variant, error=told(error))
    made: dict[str, Any] = {"text": own.text.strip(), "seconds": own.seconds, "new_tokens": own.tokens}
    if isinstance(cache, TrimmedCache):
        report = cache.report()
        made |= {
            "visible_tokens": report.visible_tokens[0],
            "kept_tokens": report.kept_tokens[0],
            "cross_kv_bytes": report.cross_kv_bytes,
            "stock_cross_kv_bytes": report.stock_cross_kv_bytes,
            "kept": pack_kept(cache.kept_indices[0].tolist(), report.total_tokens[0]),
        }
    return Answer.of(question, variant, peak_bytes=peak_bytes() if on_gpu else 0, **made)
