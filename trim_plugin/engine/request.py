"""A request: how it shall be answered, its answer as it comes, and what is left of it at the end."""

from __future__ import annotations

import dataclasses
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trim_plugin.engine.memory import Taken
from trim_plugin.pictures.encoded import Pictures

MOST_STOPS, LONGEST_STOP = 16, 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, for one request. The names and ranges are OpenAI's and transformers'.

    Args:
        max_new_tokens: longest answer, in text tokens.
        temperature: 0 takes the likeliest token each time; above it tokens are drawn.
        top_p, top_k, min_p: leave only some tokens to be drawn from, see transformers' `TopPLogitsWarper` and its like.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely, see `RepetitionPenaltyLogitsProcessor`.
        presence_penalty, frequency_penalty: taken off the logits of the answer's tokens, once, and as often as they occur.
        seed: the same seed draws the same text, whatever else is answered meanwhile; None draws one.
        stop: the answer ends before the first of these texts.

    Raises:
        TypeError: a value is of another kind.
        ValueError: a value is out of its range.

    Example:
        >>> Sampling(temperature=0.7, stop=["."]).stop
        ('.',)
        >>> Sampling(top_p=2)
        Traceback (most recent call last):
        ...
        ValueError: top_p must be a number in (0, 1], got 2.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_count("max_new_tokens", self.max_new_tokens, 1)
        _check_number("temperature", self.temperature, 0, 2, "a number in [0, 2]")
        _check_number("top_p", self.top_p, 0, 1, "a number in (0, 1]", above=True)
        if self.top_k is not None:
            _check_count("top_k", self.top_k, 1)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, 0, 1, "a number in [0, 1]")
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, "a number above 0", above=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2, 2, "a number in [-2, 2]")
        if self.seed is not None:
            _check_count("seed", self.seed, -(2**63))
            if self.seed >= 2**63:
                raise ValueError(f"seed must be a 64-bit integer, got {self.seed}.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(text, str) for text in stop):
            raise TypeError(f"stop must be a text or a list of texts, got {self.stop!r}.")
        if len(stop) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stop):
            raise ValueError(f"stop takes at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters.")
        object.__setattr__(self, "stop", tuple(text for text in stop if text))

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether a token's chances depend on the text before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclasses.dataclass(frozen=True)
class Held:
    """What is held of a request's pictures, as if it were alone.

    Args:
        kept_indices: the visual tokens that decoding could read, ascending; they count through all of its pictures.
        total_tokens: visual tokens that its pictures became, padding tiles included.
        cross_kv_bytes: bytes of the visual keys and values.
        stock_cross_kv_bytes: bytes that transformers' own cache would hold.
    """

    kept_indices: list[int]
    total_tokens: int
    cross_kv_bytes: int
    stock_cross_kv_bytes: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """What came of a request.

    Args:
        text: the answer.
        finish_reason: "stop" (an end token, or a text of `stop`), "length" or "cancelled".
        tokens: ids of the generated tokens, the end token included.
        prompt_tokens: text tokens of the prompt.
        kept: visual tokens that decoding could read.
        visible: visual tokens that the prompt could read.
        held: what is held of its pictures, if that was asked for.
    """

    text: str
    finish_reason: str
    tokens: list[int]
    prompt_tokens: int
    kept: int
    visible: int
    held: Held | None = None


class Request:
    """A question on its way through an `Engine`. Safe to use from any thread.

    Iterating yields text as it comes, to its end; once. `result()` waits for the whole.
    """

    def __init__(
        self,
        prompt: Any,
        pictures: Any,
        sampling: Sampling,
        config: Any,
        prompt_tokens: int,
        takes: Taken,
        listener: Callable[[str | None], None] | None = None,
        tells_held: bool = False,
    ) -> None:
        self.sampling, self.config, self.prompt_tokens = sampling, config, prompt_tokens
        #: What it draws with, whenever it has to be read again.
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._listener = listener
        #: Whether its answer says what is held of its pictures.
        self.tells_held = tells_held
        #: The prompt as the tokenizer gets it; RGB pictures, or encoded ones.
        self.prompt, self.pictures = prompt, pictures
        #: How many pictures there are.
        self.shown = len(pictures.tiles if isinstance(pictures, Pictures) else pictures)
        #: What it will take while it runs, expected; and its bytes in all.
        self.takes, self.needed = takes, takes.total
        #: How often it was read again because what is held for all had broken.
        self.starts = 0
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._cancelled = threading.Event()
        self._finished: Finished | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Finished:
        """Wait for the answer.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it is not finished yet.
            Exception: what went wrong while it was answered.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"The request is not finished after {timeout} seconds.")
        if self._error is not None:
            raise self._error
        if self._finished is None:
            raise RuntimeError("The request ended without an answer.")
        return self._finished

    def cancel(self) -> None:
        """Stop answering at the next step; `result()` gives what there is. Nothing happens if it is finished."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked to stop."""
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        """Whether the answer, or an error, is there."""
        return self._done.is_set()

    # -- for the engine ----------------------------------------------------------------------------------------------

    def send(self, text: str) -> None:
        """Hand on some text."""
        if text:
            self._put(text)

    def finish(self, finished: Finished) -> None:
        """Hand on that this is all."""
        self._finished = finished
        self._end()

    def fail(self, error: BaseException) -> None:
        """Hand on what went wrong."""
        self._error = self._error or error
        self._end()

    def _end(self) -> None:
        self.pictures = None  # pixels are not held for as long as somebody holds the answer
        self._done.set()
        self._put(None)

    def _put(self, piece: str | None) -> None:
        self._pieces.put(piece)
        if self._listener is not None:
            try:
                self._listener(piece)
            except BaseException as error:  # noqa: BLE001 - a caller's mistake is told to that caller, and ends its request alone
                self._listener, self._error = None, error
                self.cancel()


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _check_number(name: str, value: Any, low: float, high: float, allowed: str, above: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got {value!r}.")
    if not low <= value <= high or (above and value == low) or not math.isfinite(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
