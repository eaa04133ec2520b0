"""Answers on disk: appended as they come, so that an interrupted run goes on, and several processes share the work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trim_plugin.asking.results import ResultFile
from trim_plugin.durable import append_lines
from trim_plugin.evaluation.questions import Question
from trim_plugin.variants import Variant


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one generation gave.

    Args:
        question: name of the question.
        way: name of the variant.
        text: the answer.
        seconds: wall-clock time of `generate`, vision tower and prefill included; of an answer that was given among others its
            share of the time that all of them took.
        new_tokens: generated text tokens.
        visible_tokens: visual tokens that the text may read; 0 for stock, which does not count them.
        kept_tokens: visual tokens that decoding could read; 0 for stock.
        cross_kv_bytes: bytes of the cached visual keys and values; for stock see `stock_cross_kv_bytes` of the others.
        stock_cross_kv_bytes: bytes that transformers' own cache would hold.
        peak_bytes: most memory allocated on the GPU meanwhile, weights included, and what others took that were answered at once;
            0 without a GPU.
        asked: the question's text.
        pictures: file names of its pictures.
        right: answers that count as right; empty if none is known.
        kept: which visual tokens decoding could read, a bit each, as hexadecimal digits (`pack_kept`); empty for stock.
        error: why there is no answer; empty if there is one.
        at_once: how many questions were answered at once, at most; 1 if this one was alone.
    """

    question: str
    way: str
    text: str
    seconds: float
    new_tokens: int
    visible_tokens: int = 0
    kept_tokens: int = 0
    cross_kv_bytes: int = 0
    stock_cross_kv_bytes: int = 0
    peak_bytes: int = 0
    asked: str = ""
    pictures: Sequence[str] = ()
    right: Sequence[str] = ()
    kept: str = ""
    error: str = ""
    at_once: int = 1

    @classmethod
    def of(cls, question: Question, variant: Variant, **made: Any) -> Answer:
        """What was made of a question, an error for instance, with what was asked beside it."""
        fields: dict[str, Any] = {"text": "", "seconds": 0.0, "new_tokens": 0, **made}
        pictures = tuple(picture.name for picture in question.pictures)
        return cls(
            question.name, variant.name, asked=question.text, pictures=pictures, right=question.answers, **fields
        )


def pack_kept(indices: Sequence[int], total: int) -> str:
    """Which of `total` visual tokens are kept, a bit each, as hexadecimal digits.

    Example:
        >>> pack_kept([0, 9], 12), unpack_kept("8040", 12).nonzero()[0].tolist()
        ('8040', [0, 9])
    """
    kept = np.zeros(total, dtype=bool)
    kept[list(indices)] = True
    return np.packbits(kept).tobytes().hex()


def unpack_kept(digits: str, total: int) -> np.ndarray:
    """bool (visual tokens,): what `pack_kept` packed."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=total).astype(bool)


#: Fields that an answer's line has, and those that it may lack.
_FIELDS = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(Answer)}


class AnswerLog(ResultFile):
    """The answers so far, in `answers-*.jsonl` of a folder; each process appends to a file of its own.

    A line that an interruption cut short is set aside, and its question is answered again.

    Args:
        folder: made if need be.
        settings: what the answers depend on; a folder with answers of other settings is refused.
        process: which of the processes this is.

    Raises:
        ValueError: the folder holds answers that were made with other settings, or one of its files something else. It is left
            as it is.
        OSError: it cannot be read or written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> AnswerLog(folder, {"model": "small"}).add(Answer("1", "stock", "seven", 0.5, 2))
        >>> [answer.text for answer in AnswerLog(folder, {"model": "small"}).answers()]
        ['seven']
        >>> AnswerLog(folder, {"model": "large"})
        Traceback (most recent call last):
        ...
        ValueError: ... holds answers of another run (model was 'small', now 'large'). Give another folder...
    """

    FIRST, CALLED = "question", "answers"

    def __init__(self, folder: Path, settings: Mapping[str, Any], process: int = 0) -> None:
        super().__init__(folder / f"answers-{process}.jsonl", settings, folder)
        self.folder, self._seen = folder, 0
        self.answers()

    def add(self, answer: Answer) -> None:
        """Append an answer; it is on disk when this returns."""
        with self._locked():
            self._check_settings()
            self._lines(self.file, self._seen)  # another process may have left half a line
            append_lines(self.file, [json.dumps(dataclasses.asdict(answer)).encode()])
            self._seen = self.file.stat().st_size

    def answers(self) -> list[Answer]:
        """The answers of all processes, one for each question and variant; an answer counts more than an error."""
        found: dict[tuple[str, str], Answer] = {}
        with self._locked():
            self._check_settings()
            lines = [line for file in sorted(self.folder.glob("answers-*.jsonl")) for _, line in self._lines(file)]
        for fields in filter(None, lines):
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            answer = Answer(**(fields | lists))
            known = found.get((answer.question, answer.way))
            if known is None or known.error:
                found[answer.question, answer.way] = answer
        return list(found.values())

    def _known_settings(self) -> dict[str, Any] | None:
        known = super()._known_settings()
        if known is None and self._settings_file.exists():  # answers do not say themselves how they were made
            raise ValueError(f"{self._settings_file} is damaged. {self._another}, or remove this one.")
        return known

    def _is_result(self, found: Mapping[str, Any]) -> bool:
        return {name for name, needed in _FIELDS.items() if needed} <= set(found) <= set(_FIELDS)
