"""The worker behind every way of answering many rows: the command line, Ray, a loop of one's own."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from trim_plugin.asking.answers import OF_ALL, is_full, told
from trim_plugin.asking.rows import Row
from trim_plugin.config import TrimConfig
from trim_plugin.engine.engine import MAX_RUNNING, Engine, EngineClosed
from trim_plugin.engine.request import Request

#: For every request that runs so many are read: decoded pictures are large, and one that waits is enough to take its place.
READ_AHEAD = 2
#: So many rows that fail alike, one after the other while nobody else gets on, are not at fault themselves.
MOST_ALIKE = 16
#: A row's place among those that the worker was called with, and its result.
Placed = tuple[int, dict[str, Any]]
Rows = Sequence[Row | Mapping[str, Any]]


class RowsFail(RuntimeError):
    """`MOST_ALIKE` rows in a row have failed with one kind of error: a mistake in code, or a device that is broken."""


class Worker:
    """Answers rows greedily with the trimmed cache: made once, called with as many rows as one likes.

    Rows go into an `Engine` as they fit, and results come as they finish. A row that cannot be answered, whatever the reason,
    becomes an error in its own result, and nobody else's. What is no row's fault is raised (see `answers`).

    Args:
        model: an Mllama model or a wrapper around one, in eval mode, on its device. Nobody else may use it
            while rows are answered.
        processor: its `MllamaProcessor`.
        config: of the trimmed caches, as `Engine` takes it.
        max_running: rows that are answered at once.
        memory: bytes that their keys and values may take; None takes what the model's device has free.
        max_new_tokens: longest answer, in text tokens, of rows that don't say.
        folder: what relative names of pictures start from.
        picture_folder: where encoded pictures are kept for later runs; None keeps none.
        tell_held: whether each result says, under "held", which visual tokens were kept and what they take (`Held`); no JSON.

    Raises:
        ValueError: a number is not positive, or the configuration is one that an `Engine` cannot have.
        OSError: `picture_folder` cannot be made.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> worker = Worker(*load_small_model(), {"top_k_ratio": 0.25})
        >>> first, second = examples()[:2]
        >>> answers = worker([
        ...     {"id": "a", "images": [first.picture], "question": first.question},
        ...     {"id": "b", "images": ["nowhere.png"], "question": "Which digit is red?"},
        ... ])
        >>> answers[0]["answer"] == first.answer, answers[1]
        (True, {'id': 'b', 'error': 'no such picture: nowhere.png'})
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: TrimConfig | Mapping[str, Any] | None = None,
        *,
        max_running: int = MAX_RUNNING,
        memory: int | None = None,
        max_new_tokens: int = 128,
        folder: Path | str = ".",
        picture_folder: Path | str | None = None,
        tell_held: bool = False,
    ) -> None:
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}.")
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.folder = Path(folder)
        self.tell_held = tell_held
        self.engine = Engine(
            model, processor, config, memory=memory, max_running=max_running, picture_folder=picture_folder
        )
        self.config = self.engine.config
        self._most = READ_AHEAD * max_running
        # Its thread holds the model: it ends when nobody has the worker any more.
        self._ending = weakref.finalize(self, self.engine.close, cancel=True)

    def close(self) -> None:
        """Answer nothing any more. The worker does so by itself when nobody holds it."""
        self._ending()

    def __call__(self, rows: Rows) -> list[dict[str, Any]]:
        """The results of rows, in their order.

        Args:
            rows: see `asking.rows.Row.of`.

        Returns:
            For every row its "id", if it has one, and either "error", a sentence, or "answer" with "tokens" (generated),
            "prompt_tokens", "visible" (visual tokens that the text may read), "kept" (those that decoding read) and "seconds"
            (from when it was read to the end of its answer, beside others).
        """
        placed = [answer for answers in self.answers(rows) for answer in answers]
        return [result for _, result in sorted(placed, key=lambda answer: answer[0])]

    def answers(self, rows: Rows) -> Iterator[list[Placed]]:
        """The same as they come, some at a time: each with the row's place in `rows`.

        Raises:
            torch.AcceleratorError: the device is lost, for rows that follow, too.
            OSError: a disk is full, or gone: a picture cannot be written to `picture_folder`, for instance.
            RowsFail: `MOST_ALIKE` rows in a row have failed with one kind of error, memory aside, and no other row that is being
                answered has any text yet. They have their results by then.
            EngineClosed: the worker is closed, or its engine's thread has died.
        """
        run = _Run(self, rows)
        try:
            for place in range(len(rows)):
                refused = run.ask(place)
                found = [] if refused is None else [(place, refused)]
                found += run.finished(wait=len(run.asked) >= self._most)
                if found:
                    yield found
                run.check()
            while run.asked:
                yield run.finished(wait=True)
                run.check()
        finally:
            run.cancel()

    def submit(self, row: Row | Mapping[str, Any], listener: Callable[[str | None], None]) -> Request:
        """Give a row to the engine.

        Raises:
            ValueError: the row cannot be answered.
            EngineClosed: the worker is closed, or its engine's thread has died.
        """
        row = Row.of(row)
        return self.engine.submit(
            row.messages or row.question,
            [self.folder / image if isinstance(image, str | Path) else image for image in row.images],
            max_new_tokens=row.max_new_tokens or self.max_new_tokens,
            listener=listener,
            tell_held=self.tell_held,
        )

    def result(self, request: Request, seconds: float) -> dict[str, Any]:
        """The answer to a request that is done, as it stands in a file of results.

        Raises:
            Exception: what went wrong while it was answered.
            EngineClosed: the worker is closed, or its engine's thread has died.
        """
        try:
            finished = request.result()
        except OF_ALL:
            raise
        except (Exception, SystemExit) as error:
            if self.engine.healthy:
                raise
            raise EngineClosed(f"The worker was closed while it answered. {told(error)}") from error
        if finished.finish_reason == "cancelled":
            raise EngineClosed("The worker was closed while it answered.")
        result = {
            "answer": self.processor.decode(finished.tokens, skip_special_tokens=True).strip(),
            "tokens": len(finished.tokens),
            "prompt_tokens": finished.prompt_tokens,
            "visible": finished.visible,
            "kept": finished.kept,
            "seconds": round(seconds, 4),
        }
        return {**result, "held": finished.held} if self.tell_held else result


class _Run:
    """Rows on their way through a worker's engine."""

    def __init__(self, worker: Worker, rows: Rows) -> None:
        self._worker, self._rows = worker, rows
        #: By their places: the request, and when it went in.
        self.asked: dict[int, tuple[Request, float]] = {}
        self._done: SimpleQueue[tuple[int, float]] = SimpleQueue()
        #: Places of rows that have some text, and are not done.
        self._begun: set[int] = set()
        #: How many rows in a row have failed with this kind of error; and the last of too many.
        self._alike, self._kind = 0, BaseException
        self._cause: BaseException | None = None

    def ask(self, place: int) -> dict[str, Any] | None:
        """Give a row to the engine, or say what is wrong with it."""

        def listen(piece: str | None) -> None:
            if piece is None:
                self._done.put((place, time.perf_counter()))
            else:
                self._begun.add(place)

        since = time.perf_counter()
        try:
            self.asked[place] = self._worker.submit(self._rows[place], listen), since
        except ValueError as error:  # what is wrong with a row
            return {**_id(self._rows[place]), "error": str(error)}
        except (EngineClosed, *OF_ALL):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one row must not end the run of all others
            return self._failed(place, error)
        return None

    def finished(self, *, wait: bool) -> list[Placed]:
        """Results of rows that are done; `wait` until there is one."""
        found: list[Placed] = []
        while self.asked and (wait or not self._done.empty()):
            (place, until), wait = self._done.get(), False
            request, since = self.asked.pop(place)
            self._begun.discard(place)
            try:
                result = {**_id(self._rows[place]), **self._worker.result(request, until - since)}
                self._alike, self._cause = 0, None
            except (EngineClosed, *OF_ALL):
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
                result = self._failed(place, error)
            found.append((place, result))
            if self._cause is not None:
                break  # `check` is asked before the next one: rows that have failed by then change nothing
        return found

    def _failed(self, place: int, error: BaseException) -> dict[str, Any]:
        """The result of a row that has failed."""
        if not is_full(error):  # how much memory it takes is a row's own matter
            self._alike = self._alike + 1 if type(error) is self._kind else 1
            self._kind = type(error)
        self._cause = error if self._alike >= MOST_ALIKE else None
        return {**_id(self._rows[place]), "error": told(error)}

    def check(self) -> None:
        """Raise `RowsFail` if it looks as if no row could be answered."""
        if self._cause is not None and not self._begun:
            raise RowsFail(
                f"{self._alike} rows in a row have failed alike, while no other was answered. The last: {told(self._cause)}"
            ) from self._cause

    def cancel(self) -> None:
        """Answer no more of them."""
        for request, _ in self.asked.values():
            request.cancel()


def _id(row: Any) -> dict[str, Any]:
    name = row.id if isinstance(row, Row) else row.get("id") if isinstance(row, Mapping) else None
    return {} if name is None else {"id": name}
