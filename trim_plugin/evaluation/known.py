"""Pictures that several questions ask about: encoded once for all of them, and what that has cost."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from trim_plugin.evaluation.log import Answer
from trim_plugin.evaluation.peaks import peak_bytes, reset_peaks
from trim_plugin.evaluation.questions import Question
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.recent import RecentPictures


class KnownPictures:
    """Encoded pictures of the questions that don't have theirs for themselves.

    Args:
        model: an Mllama model.
        processor: its processor.
        questions: all that will be asked.
        most_bytes: main memory for encoded pictures; 0 encodes nothing.

    Example:
        >>> from pathlib import Path
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> from trim_plugin.pictures.prompting import open_picture
        >>> file = examples()[0].picture
        >>> twice, once = [Question(name, (file,), "?") for name in "ab"], Question("c", (Path("other.png"),), "?")
        >>> known = KnownPictures(*load_small_model(), [*twice, once], 2**20)
        >>> known.of(twice[0], [open_picture(file)]) is None, known.of(once, []) is None
        (False, True)
    """

    def __init__(self, model: Any, processor: Any, questions: Sequence[Question], most_bytes: int) -> None:
        self._asked = Counter(question.pictures for question in questions)
        self._recent = RecentPictures(model, processor, most_bytes=most_bytes) if most_bytes else None
        self._on_gpu = next(model.parameters()).is_cuda
        self._warm = False
        #: Seconds and peak bytes on the GPU of encoding these pictures, the last time.
        self._costs: dict[tuple[Any, ...], tuple[float, int]] = {}

    def of(self, question: Question, pictures: list[Image.Image], tower_share: float | None = None) -> Pictures | None:
        """A question's pictures, encoded now or earlier with this `tower_share`; None if no other question asks about them."""
        if self._recent is None or not pictures or self._asked[question.pictures] < 2:
            return None
        if not self._warm:  # the first encoding pays for allocations and kernels: not timed
            self._recent(pictures, tower_share)
            self._recent.forget()
            self._warm = True
        before, start = self._recent.encoded, time.perf_counter()
        if self._on_gpu:
            reset_peaks()
        found = self._recent(pictures, tower_share)
        if self._recent.encoded > before:
            peak = peak_bytes() if self._on_gpu else 0
            self._costs[question.pictures, tower_share] = time.perf_counter() - start, peak
        return found

    def charged(self, question: Question, answer: Answer, tower_share: float | None = None) -> Answer:
        """An answer on encoded pictures with its part of what encoding them took: one of as many as ask about them."""
        seconds, peak = self._costs.get((question.pictures, tower_share), (0.0, 0))
        return dataclasses.replace(
            answer,
            seconds=answer.seconds + seconds / self._asked[question.pictures],
            peak_bytes=max(answer.peak_bytes, peak),
        )
