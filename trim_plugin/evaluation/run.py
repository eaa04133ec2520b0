"""Answering questions with several variants: stock and trimmed caches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trim_plugin.asking.prompts import read_prompt
from trim_plugin.asking.rows import Row
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.evaluation.known import KnownPictures
from trim_plugin.evaluation.log import Answer, AnswerLog, pack_kept
from trim_plugin.evaluation.peaks import peak_bytes, reset_peaks
from trim_plugin.evaluation.questions import Question
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.prompting import open_picture, tensors_of
from trim_plugin.pictures.recent import DEFAULT_BYTES
from trim_plugin.variants import Variant


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    log: AnswerLog,
    *,
    max_new_tokens: int = 64,
    process: int = 0,
    processes: int = 1,
    encoded_bytes: int = DEFAULT_BYTES,
    on_answer: Callable[[Answer], None] | None = None,
) -> None:
    """Answer what the log doesn't hold yet, greedily, one question at a time, and log every answer.

    Not with an `Engine`: what a question takes alone, its seconds and its peak memory, is a part of the result, and so is which
    visual tokens are kept; one of the variants is transformers' own cache.

    A picture that cannot be read, or a chat that does not fit the model, is logged as its question's error; the others are
    answered. Pictures that several questions ask about are encoded once, whole, for all trimmed variants of one `tower_share`,
    which changes no answer; each question is charged its part of the time.

    Args:
        model: an Mllama model, on its device.
        processor: its processor.
        questions: all questions; this process takes every `processes`-th.
        variants: how to answer each.
        log: where answers go.
        max_new_tokens: longest answer of questions that don't say.
        process: which process this is, 0 … processes − 1.
        processes: how many share the questions.
        encoded_bytes: most main memory for encoded pictures; 0 reads pictures anew for every answer.
        on_answer: called after every answer, for progress.
    """
    share = questions[process::processes]
    known = KnownPictures(model, processor, share, encoded_bytes)
    done = {(answer.question, answer.way) for answer in log.answers() if not answer.error}
    device = next(model.parameters()).device
    most = model.config.get_text_config().max_position_embeddings
    warm: set[str] = set()

    def record(answer: Answer) -> None:
        log.add(answer)
        if on_answer is not None:
            on_answer(answer)

    for question in share:
        missing = [variant for variant in variants if (question.name, variant.name) not in done]
        if not missing:
            continue
        try:
            pictures = [open_picture(picture) for picture in question.pictures]
            asked = Row(
                images=tuple(pictures), question="" if question.messages else question.text, messages=question.messages
            )
            prompt = read_prompt(processor, asked, Path(), most, question.max_new_tokens or max_new_tokens)
        except (FileNotFoundError, ValueError) as error:
            for variant in missing:
                record(_blank(question, variant, error=str(error)))
            continue
        tensors = tensors_of(processor, [prompt.text], [pictures])
        inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
        for variant in missing:
            encoded = None if variant.stock else known.of(question, pictures, variant.tower_share)
            asking = _Asked(question, variant, inputs, encoded, question.max_new_tokens or max_new_tokens)
            if variant.name not in warm:  # the first generation pays for allocations and kernels: not timed
                _generate(model, processor, asking)
                warm.add(variant.name)
            answer = _generate(model, processor, asking)
            record(answer if encoded is None else known.charged(question, answer, variant.tower_share))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A question to one variant: the processor's inputs, its pictures if they are encoded, and the longest answer."""

    question: Question
    variant: Variant
    inputs: dict[str, torch.Tensor]
    encoded: Pictures | None
    max_new_tokens: int


def _blank(question: Question, variant: Variant, error: str = "") -> Answer:
    """An answer without text, with what was asked beside it."""
    return Answer(
        question=question.name,
        way=variant.name,
        text="",
        seconds=0.0,
        new_tokens=0,
        asked=question.text,
        pictures=tuple(picture.name for picture in question.pictures),
        right=question.answers,
        error=error,
    )


def _generate(model: Any, processor: Any, asked: _Asked) -> Answer:
    question, variant, inputs = asked.question, asked.variant, asked.inputs
    settings: dict[str, Any] = {}
    if asked.encoded is not None:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    elif variant.config is not None:
        settings = {"cache_implementation": "trimmed", "cache_config": variant.config}
    on_gpu = inputs["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        reset_peaks()
    start = time.perf_counter()
    if asked.encoded is not None:
        settings = {CACHE: TrimmedCache(model, variant.config, pictures=asked.encoded)}
    output = model.generate(
        **inputs, max_new_tokens=asked.max_new_tokens, do_sample=False, return_dict_in_generate=True, **settings
    )
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    answer = dataclasses.replace(
        _blank(question, variant),
        text=processor.decode(new, skip_special_tokens=True).strip(),
        seconds=seconds,
        new_tokens=len(new),
        peak_bytes=peak_bytes() if on_gpu else 0,
    )
    if variant.config is None:
        return answer
    cache = cache_of(output)
    report = cache.report()
    return dataclasses.replace(
        answer,
        visible_tokens=report.visible_tokens[0],
        kept_tokens=report.kept_tokens[0],
        cross_kv_bytes=report.cross_kv_bytes,
        stock_cross_kv_bytes=report.stock_cross_kv_bytes,
        kept=pack_kept(cache.kept_indices[0].tolist(), report.total_tokens[0]),
    )
