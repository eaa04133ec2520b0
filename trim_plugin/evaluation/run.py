"""Answering questions in several ways: stock and trimmed caches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trim_plugin.compat import CACHE, cache_of
from trim_plugin.config import TrimConfig
from trim_plugin.evaluation.known import KnownPictures
from trim_plugin.evaluation.log import Answer, AnswerLog, pack_kept
from trim_plugin.evaluation.questions import Question
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.prompting import build_inputs, open_picture
from trim_plugin.pictures.recent import DEFAULT_BYTES
from trim_plugin.selection.k_center import KCenter
from trim_plugin.selection.processors import checked_share


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to answer: stock (`config` is None) or a trimmed cache."""

    name: str
    config: TrimConfig | None


def ways_for(
    ratios: Sequence[float],
    kv_quantization: str | None = None,
    *,
    shares: Sequence[float] = (),
    radii: Sequence[float] = (),
    merge: bool = True,
    tower_share: float | None = None,
    stock: bool = True,
) -> list[Way]:
    """Stock, and a trimmed cache for each ratio (1.0 is exact mode) and each value of the other rules.

    Args:
        ratios: `TrimConfig.top_k_ratio`.
        kv_quantization: as in `TrimConfig`.
        shares: of `KCenter`.
        radii: of `KCenter(radius=…)`.
        merge: as in `TrimConfig`. Exact mode drops nothing, so it is the same either way.
        tower_share: as in `TrimConfig`, for all of them but stock. With it a ratio of 1.0 is not exact, and not called so.
        stock: whether transformers' own cache comes first.

    Example:
        >>> [way.name for way in ways_for([1.0, 0.25], "int8", shares=[0.1])]
        ['stock', 'exact, int8', '0.25, int8', 'k-center 0.1, int8']
        >>> [way.name for way in ways_for([1.0, 0.25], radii=[0.2], merge=False, stock=False)]
        ['exact', '0.25, dropped', 'radius 0.2, dropped']
        >>> [way.name for way in ways_for([1.0, 0.25], tower_share=0.5)]
        ['stock', 'nothing dropped, tower 0.5', '0.25, tower 0.5']
    """
    tower_share = checked_share(tower_share)
    whole, tower = ("exact", "") if tower_share is None else ("nothing dropped", f"tower {tower_share:g}")
    rules: list[tuple[str, dict[str, Any]]] = [
        (whole if ratio == 1.0 else f"{ratio:g}", {"top_k_ratio": ratio}) for ratio in ratios
    ]
    rules += [(f"k-center {kept:g}", {"processors": [KCenter(kept)]}) for kept in shares]
    rules += [(f"radius {radius:g}", {"processors": [KCenter(radius=radius)]}) for radius in radii]
    ways = [Way("stock", None)] if stock else []
    for name, rule in rules:
        config = TrimConfig(**rule, kv_quantization=kv_quantization, merge=merge, tower_share=tower_share)
        forgets = "" if merge or config.keeps_reachable else "dropped"
        ways.append(Way(", ".join(filter(None, [name, forgets, kv_quantization, tower])), config))
    return ways


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    ways: Sequence[Way],
    log: AnswerLog,
    *,
    max_new_tokens: int = 64,
    process: int = 0,
    processes: int = 1,
    encoded_bytes: int = DEFAULT_BYTES,
    on_answer: Callable[[Answer], None] | None = None,
) -> None:
    """Answer what the log doesn't hold yet, greedily, one question at a time, and log every answer.

    A picture that cannot be read is logged as its question's error; the others are answered. Pictures that several questions ask
    about are encoded once, whole, for all trimmed ways of one `tower_share`, which changes no answer; each question is charged
    its part of the time.

    Args:
        model: an Mllama model, on its device.
        processor: its processor.
        questions: all questions; this process takes every `processes`-th.
        ways: how to answer each.
        log: where answers go.
        max_new_tokens: longest answer.
        process: which process this is, 0 … processes − 1.
        processes: how many share the questions.
        encoded_bytes: most main memory for encoded pictures; 0 reads pictures anew for every answer.
        on_answer: called after every answer, for progress.
    """
    share = questions[process::processes]
    known = KnownPictures(model, processor, share, encoded_bytes)
    done = {(answer.question, answer.way) for answer in log.answers() if not answer.error}
    device = next(model.parameters()).device
    warm: set[str] = set()

    def record(answer: Answer) -> None:
        log.add(answer)
        if on_answer is not None:
            on_answer(answer)

    for question in share:
        missing = [way for way in ways if (question.name, way.name) not in done]
        if not missing:
            continue
        try:
            pictures = [open_picture(picture) for picture in question.pictures]
        except (FileNotFoundError, ValueError) as error:
            for way in missing:
                record(_blank(question, way, error=str(error)))
            continue
        inputs = build_inputs(processor, question.text, pictures, device)
        for way in missing:
            tower_share = None if way.config is None else way.config.tower_share
            encoded = None if way.config is None else known.of(question, pictures, tower_share)
            asked = _Asked(question, way, inputs, encoded)
            if way.name not in warm:  # the first generation pays for allocations and kernels: not timed
                _generate(model, processor, asked, max_new_tokens)
                warm.add(way.name)
            answer = _generate(model, processor, asked, max_new_tokens)
            record(answer if asked.encoded is None else known.charged(question, answer, tower_share))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A question in one way: the processor's inputs, and its pictures if they are encoded."""

    question: Question
    way: Way
    inputs: dict[str, torch.Tensor]
    encoded: Pictures | None


def _blank(question: Question, way: Way, error: str = "") -> Answer:
    """An answer without text, with what was asked beside it."""
    return Answer(
        question=question.name,
        way=way.name,
        text="",
        seconds=0.0,
        new_tokens=0,
        asked=question.text,
        pictures=tuple(picture.name for picture in question.pictures),
        right=question.answers,
        error=error,
    )


def _generate(model: Any, processor: Any, asked: _Asked, max_new_tokens: int) -> Answer:
    question, way, inputs = asked.question, asked.way, asked.inputs
    settings: dict[str, Any] = {}
    if asked.encoded is not None:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    elif way.config is not None:
        settings = {"cache_implementation": "trimmed", "cache_config": way.config}
    on_gpu = inputs["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    if asked.encoded is not None:
        settings = {CACHE: TrimmedCache(model, way.config, pictures=asked.encoded)}
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **settings
    )
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    answer = dataclasses.replace(
        _blank(question, way),
        text=processor.decode(new, skip_special_tokens=True).strip(),
        seconds=seconds,
        new_tokens=len(new),
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
    )
    if way.config is None:
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
