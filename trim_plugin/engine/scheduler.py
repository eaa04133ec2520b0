"""The thread that owns the model: who is read, who takes the next step, and what becomes of failures."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import torch

from trim_plugin.asking.answers import is_full
from trim_plugin.config import TrimConfig
from trim_plugin.engine.memory import Room, Taken
from trim_plugin.engine.reading import Reader
from trim_plugin.engine.request import Request
from trim_plugin.engine.running import Running, RunningBatch
from trim_plugin.engine.sampling import Drawer, Writer, choose
from trim_plugin.pictures.recent import RecentPictures

#: Prompts that are read at a time.
MICRO_BATCH = 8
#: How often a request starts over because what is held for all has broken; the next time is its failure.
MOST_STARTS = 3


class EngineClosed(RuntimeError):
    """A request came to an engine that is closed, or whose thread has died."""


class Scheduler:
    """Requests in the order in which they came, and the batch of those that run.

    Args:
        model, processor, config: as for `Engine`.
        room: bytes for running requests.
        most: requests that run at once.
        pictures: encodes pictures, each once.
    """

    def __init__(
        self, model: Any, processor: Any, config: TrimConfig, room: Room, most: int, pictures: RecentPictures
    ) -> None:
        self._tokenizer = processor.tokenizer
        self._room, self._most, self._pictures = room, most, pictures
        self._reader = Reader(model, processor, config, room, pictures)
        self._batch = RunningBatch(model, config)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        #: Each with the number of characters that were sent before it had to be read again.
        self._waiting: collections.deque[tuple[Request, int]] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        #: Whether nobody is answered any further: not even those who are just being read, and so neither wait nor run.
        self._cancelling = False
        self.died: BaseException | None = None
        #: Nothing more is read until somebody has left: the device was full.
        self._full = False
        self._micro_batch = MICRO_BATCH
        #: Requests that run at once where fewer than `most` have turned out to fit; one more for each that ends.
        self._fitting = most
        self.counts: collections.Counter[str] = collections.Counter()
        self._held: dict[str, int] = {"held_bytes": 0, "picture_bytes": 0}
        self.thread = threading.Thread(target=self._run, name="trim_plugin-engine", daemon=True)

    # -- from any thread -----------------------------------------------------------------------------------------------

    def put(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            EngineClosed: nothing is answered any more.
        """
        with self._changed:
            self.check_open()
            self._waiting.append((request, 0))
            self._changed.notify_all()

    def close(self, cancel: bool) -> None:
        """Take nothing more, and end once all is answered, or at the next step."""
        with self._changed:
            self._closing = True
            self._cancelling |= cancel
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raise `EngineClosed` if nothing is answered any more."""
        if self.died is not None:
            raise EngineClosed(f"The engine's thread has died: {self.died!r}. Make a new engine.")
        if self._closing:
            raise EngineClosed("The engine is closed. Make a new one.")

    def stats(self) -> dict[str, int]:
        """See `Engine.stats`."""
        pictures = {"pictures_encoded": self._pictures.encoded, "pictures_reused": self._pictures.reused}
        return {
            "running": len(self._batch.rows),
            "waiting": len(self._waiting),
            **self._held,
            **pictures,
            **self.counts,
        }

    def _requests(self) -> list[Request]:
        return [*(request for request, _ in self._waiting), *(row.request for row in list(self._batch.rows))]

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                self._step()
                self._held = {"held_bytes": self._batch.held_bytes(), "picture_bytes": self._pictures.nbytes}
        except BaseException as error:  # noqa: BLE001 - whatever ends the thread has to be told to everybody who waits
            self.died = error
        finally:
            closed = self.died or EngineClosed("The engine was closed.")
            with self._changed:
                left = self._requests()
                self._waiting.clear()
                self._closing = True
            for request in left:
                request.fail(closed)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._waiting and not self._batch.rows:
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _drop_cancelled(self) -> None:
        if self._cancelling:
            for request in self._requests():
                request.cancel()
        self._leave([place for place, row in enumerate(self._batch.rows) if row.request.cancelled], "cancelled")
        with self._changed:
            cancelled = [request for request, _ in self._waiting if request.cancelled]
            if cancelled:
                gone = set(map(id, cancelled))
                self._waiting = collections.deque(one for one in self._waiting if id(one[0]) not in gone)
        for request in cancelled:
            self._finish(Running(request, Drawer(request.sampling, ()), Writer(self._tokenizer), 0, 0, 0), "cancelled")

    def _taken(self) -> Taken:
        longest = sum(
            self._room.text_bytes(row.request.prompt_tokens + row.request.sampling.max_new_tokens)
            for row in self._batch.rows
        )
        return Taken(longest, sum(row.visual_bytes for row in self._batch.rows))

    def _admit(self) -> None:
        """Read at most one micro-batch of those who have waited longest, all with pictures or all without."""
        if self._full and self._batch.rows:
            return
        self._full = False
        free = min(self._most, self._fitting) - len(self._batch.rows)
        if self._batch.rows and len(self._waiting) > free and free < min(self._micro_batch, max(1, self._most // 4)):
            return  # more wait than can run: a few places are let gather, since prompts that are read together cost less
        chosen: list[tuple[Request, int]] = []
        taken, shown = self._taken(), 0
        with self._changed:
            while self._waiting and len(chosen) < min(self._micro_batch, free):
                request, _ = self._waiting[0]
                shown += request.shown
                if chosen and (shown > self._reader.together or not _alike(request, chosen[0][0])):
                    break
                if not self._room.fits(taken, request.takes) and (chosen or self._batch.rows):
                    break
                taken += request.takes
                chosen.append(self._waiting.popleft())
        if not chosen:
            return
        try:
            self._batch.tidy()  # what those who have ended held is counted as free
        except BaseException as error:  # noqa: BLE001 - as below
            self._start_over(error, chosen)
            return
        try:
            rows, cache, mask, logits = self._reader.read(chosen)
        except BaseException as error:  # noqa: BLE001 - one request's failure is that request's, whatever it is
            self._not_read(chosen, error)
            return
        try:
            self._batch.join(rows, cache, mask)
        except BaseException as error:  # noqa: BLE001 - as above
            self._start_over(error, chosen)
            return
        # Not after a step: those who have failed together would be read together again, and nobody else as long as somebody runs.
        self._micro_batch = min(MICRO_BATCH, 2 * self._micro_batch)
        self._write(choose([row.drawer for row in rows], logits), first=len(self._batch.rows) - len(rows))

    def _not_read(self, chosen: Sequence[tuple[Request, int]], error: BaseException) -> None:
        """Reading has failed: for memory it is tried again with fewer at a time or later, else one by one to find whose it is."""
        full = is_full(error)
        if len(chosen) == 1 and not (full and self._batch.rows):
            self._failed(chosen[0][0], error)
            self._micro_batch = MICRO_BATCH
            return
        self._full = full and bool(self._batch.rows) and len(chosen) == 1
        self._micro_batch = max(1, len(chosen) // 2) if full else 1
        with self._changed:
            self._waiting.extendleft(reversed(list(chosen)))

    def _step(self) -> None:
        if not self._batch.rows:
            return
        try:
            logits = self._batch.step()
        except BaseException as error:  # noqa: BLE001 - who runs is told, the engine goes on
            self._not_stepped(error)
            return
        self._write(choose([row.drawer for row in self._batch.rows], logits), first=0)

    def _not_stepped(self, error: BaseException) -> None:
        """A step has failed: whoever fails alone is told, and the others go on. If nobody does, there were too many at once."""
        places = range(len(self._batch.rows))
        lost = isinstance(error, torch.AcceleratorError)
        if len(places) == 1 or lost:
            self._fail(dict.fromkeys(places, error))
            return
        if not is_full(error):
            try:
                failing = self._batch.failing()
            except torch.AcceleratorError as error:
                failing = dict.fromkeys(places, error)
            if failing:
                self._fail(failing)
                return
        (newest,) = self._gone([len(places) - 1])
        self._full = True
        self.counts["read_again"] += 1
        with self._changed:
            self._waiting.appendleft((newest.request, newest.sent))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start_over(self, error: BaseException, chosen: Sequence[tuple[Request, int]] = ()) -> None:
        """What is held has broken while requests joined or left: everybody is read again, fewer at once."""
        again = [(row.request, row.sent) for row in self._batch.forget()]
        self._fitting = max(1, len(again) // 2 if again else len(chosen) // 2)
        stay = []
        running = {id(request) for request, _ in again}
        for request, already in (*again, *(one for one in chosen if id(one[0]) not in running)):
            request.starts += 1
            if request.starts > MOST_STARTS:
                self._failed(request, error)
            else:
                stay.append((request, already))
                self.counts["read_again"] += 1
        with self._changed:
            self._waiting.extendleft(reversed(stay))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _gone(self, places: Sequence[int], at_once: bool = True) -> list[Running]:
        """Rows that leave the batch."""
        gone = [self._batch.rows[place] for place in places]
        try:
            self._batch.leave(places, at_once)
        except BaseException as error:  # noqa: BLE001 - those who leave have theirs already
            self._start_over(error)
        self._fitting = min(self._most, self._fitting + len(gone))
        self._full = False
        return gone

    def _fail(self, errors: dict[int, BaseException]) -> None:
        """Tell requests of the batch what went wrong."""
        for row, error in zip(self._gone(list(errors)), errors.values(), strict=True):
            self._failed(row.request, error)

    def _failed(self, request: Request, error: BaseException) -> None:
        request.fail(error)
        self.counts["failed"] += 1

    def _finish(self, row: Running, reason: str) -> None:
        """Hand a whole answer on."""
        try:
            row.finish(reason)
        except BaseException as error:  # noqa: BLE001 - this request's failure
            self._failed(row.request, error)
            return
        self.counts[f"finished_{reason}"] += 1

    def _write(self, tokens: Sequence[int | BaseException], first: int) -> None:
        """Hand new tokens on, from this row of the batch on; who is finished leaves, and whose token could not be had."""
        ended: list[int] = []
        for place, token in enumerate(tokens, start=first):
            row = self._batch.rows[place]
            try:
                if isinstance(token, BaseException):
                    raise token
                reason = row.write(token, self._ends)
                self.counts["tokens"] += 1
            except BaseException as error:  # noqa: BLE001 - this request's failure
                self._failed(row.request, error)
                ended.append(place)
                continue
            if reason is not None:
                self._finish(row, reason)
                ended.append(place)
        if ended:
            self._gone(ended, at_once=False)

    def _leave(self, places: Sequence[int], reason: str) -> None:
        for row in self._gone(places) if places else ():
            self._finish(row, reason)


def _alike(one: Request, other: Request) -> bool:
    """Whether two prompts can be read together."""
    return bool(one.pictures) == bool(other.pictures) and one.config == other.config
