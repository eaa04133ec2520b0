"""The worker behind every way of answering many rows: the command line, Ray, a loop of one's own."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from trim_plugin.asking.answers import tried
from trim_plugin.asking.rows import Row
from trim_plugin.config import TrimConfig
from trim_plugin.engine.engine import MAX_RUNNING, Engine, EngineClosed
from trim_plugin.engine.request import Request

#: For every request that runs so many are read: decoded pictures are large, and one that waits is enough to take its place.
READ_AHEAD = 2
#: A row's place among those that the worker was called with, and its result.
Placed = tuple[int, dict[str, Any]]
Rows = Sequence[Row | Mapping[str, Any]]


class Worker:
    """Answers rows greedily with the trimmed cache: made once, called with as many rows as one likes.

    Rows go into an `Engine` as they fit, and results come as they finish. A row that cannot be answered becomes an error in its
    own result, and nobody else's.

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
            while run.asked:
                found = run.finished(wait=True)
                if found:
                    yield found
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
        """What has come of a request that is done, as it stands in a file of results.

        Raises:
            torch.AcceleratorError: the device is lost.
            EngineClosed: the worker is closed, or its engine's thread has died.
        """
        try:
            finished, error, _ = tried(request.result)
        except SystemExit as stopped:  # a model's code must not end the run of all other rows
            return {"error": f"the model's code asked to exit: {stopped}"}
        if finished is None and self.engine.healthy:
            return {"error": error}
        if finished is None or finished.finish_reason == "cancelled":
            raise EngineClosed(f"The worker was closed while it answered. {error}".strip())
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

    def ask(self, place: int) -> dict[str, Any] | None:
        """Give a row to the engine, or say what is wrong with it."""

        def listen(piece: str | None) -> None:
            if piece is None:
                self._done.put((place, time.perf_counter()))

        since = time.perf_counter()
        try:
            self.asked[place] = self._worker.submit(self._rows[place], listen), since
        except ValueError as error:
            return {**_id(self._rows[place]), "error": str(error)}
        return None

    def finished(self, *, wait: bool) -> list[Placed]:
        """Results of rows that are done.

        Args:
            wait: until there is one.
        """
        found: list[Placed] = []
        while self.asked and (wait or not self._done.empty()):
            (place, until), wait = self._done.get(), False
            request, since = self.asked.pop(place)
            result = self._worker.result(request, until - since)
            found.append((place, {**_id(self._rows[place]), **result}))
        return found

    def cancel(self) -> None:
        """Answer no more of them."""
        for request, _ in self.asked.values():
            request.cancel()


def _id(row: Any) -> dict[str, Any]:
    name = row.id if isinstance(row, Row) else row.get("id") if isinstance(row, Mapping) else None
    return {} if name is None else {"id": name}
