"""Continuous batching: many requests at once on one model, each as if it were alone.

One thread owns the model. Between two decoding steps it reads at most one micro-batch of prompts, so that nobody who is being
answered waits longer than that. First come, first served; who does not fit yet waits.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from trim_plugin.asking.answers import Inputs
from trim_plugin.asking.prompts import decoded, read_prompt
from trim_plugin.config import TrimConfig
from trim_plugin.engine.memory import Room
from trim_plugin.engine.request import Request, Sampling
from trim_plugin.engine.running import Running, RunningBatch
from trim_plugin.engine.sampling import Drawer, Writer, choose
from trim_plugin.forward.hooks import TrimmedCache, find_text_model
from trim_plugin.generation.micro_batches import prefill
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.layout import prompt_inputs
from trim_plugin.pictures.recent import DEFAULT_BYTES, RecentPictures

#: Requests that run at once unless something else is said, and prompts that are read at a time.
MAX_RUNNING, MICRO_BATCH = 32, 8


class EngineClosed(RuntimeError):
    """A request came to an engine that is closed, or whose thread has died."""


class Engine:
    """Answers many requests at once on one model.

    Args:
        model: an Mllama model with a vision tower, or a wrapper around one (adapters count as they are). Nobody else may use it
            meanwhile.
        processor: its `MllamaProcessor`.
        config: of the trimmed caches; a dict of `TrimConfig`'s fields does as well.
        memory: bytes that keys and values of running requests may take; None takes what the model's device has free.
        max_running: requests that run at once.
        picture_bytes: bytes of encoded pictures that are held, in main memory, for requests that ask about them again.

    Raises:
        ValueError: settings that running batches don't go with (`static`, `self_kv_quantization`), or a model without a tower.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> first = examples()[0]
        >>> with Engine(*load_small_model()) as engine:
        ...     request = engine.submit(first.question, images=[first.picture])
        ...     answer = request.result()
        >>> answer.text.strip() == first.answer, answer.finish_reason, answer.kept < answer.visible
        (True, 'stop', True)
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: TrimConfig | Mapping[str, Any] | None = None,
        *,
        memory: int | None = None,
        max_running: int | None = None,
        picture_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self.config = TrimConfig.of(config)
        if self.config.static or self.config.self_kv_quantization is not None:
            raise ValueError(
                "An Engine's batch grows and shrinks, which static caches and transformers' quantized layers cannot. Use "
                "TrimConfig(static=False, self_kv_quantization=None)."
            )
        for name, value in (("memory", memory), ("max_running", max_running)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        find_text_model(model)
        self._model, self._processor = model, processor
        self._room = Room(model, self.config, memory)
        self._most = max_running or MAX_RUNNING
        self._pictures = RecentPictures(model, processor, most_bytes=picture_bytes)
        self._batch = RunningBatch(model, self.config)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        self._waiting: collections.deque[tuple[Request, int]] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._died: BaseException | None = None
        #: Nothing more is read until somebody has left: the device was full.
        self._full = False
        self._micro_batch = MICRO_BATCH
        self.counts: collections.Counter[str] = collections.Counter()
        #: Called with a name and a value for every thing that is worth counting, see `serving.metrics`.
        self.observe: Callable[[str, float], None] = lambda name, value: None
        self._thread = threading.Thread(target=self._run, name="trim_plugin-engine", daemon=True)
        self._thread.start()

    # -- what callers use, from any thread -----------------------------------------------------------------------------

    def submit(
        self,
        messages_or_text: str | Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        pictures: Pictures | None = None,
        **settings: Any,
    ) -> Request:
        """Ask something.

        Args:
            messages_or_text: a question; or messages of a chat, whose parts `{"type": "image"}` stand for the pictures in order.
            images: pictures, files of pictures, or their bytes.
            pictures: encoded pictures instead.
            settings: fields of `Sampling`, by name.

        Raises:
            ValueError: a setting is wrong, the prompt does not fit the model or its pictures, a picture cannot be read, or the
                request could never fit into the engine's memory.
            TypeError: a setting is of another kind.
            EngineClosed: the engine is closed, or its thread has died.
        """
        unknown = sorted(set(settings) - set(Sampling.__dataclass_fields__))
        if unknown:
            raise TypeError(f"unknown setting {unknown[0]!r}. Allowed: {', '.join(Sampling.__dataclass_fields__)}.")
        sampling = Sampling(**settings)
        if images and pictures is not None:
            raise ValueError("Give images or encoded pictures, not both.")
        self._check_open()
        most = self._model.config.get_text_config().max_position_embeddings
        if pictures is not None:
            pictures.check_fits(self._model)
            ids = prompt_inputs(self._processor, [pictures.tiles], [messages_or_text], pictures.most_tiles)["input_ids"]
            text, tokens, tiles, own = messages_or_text, ids.shape[1], sum(pictures.tiles), pictures
            if tokens + sampling.max_new_tokens > most:
                raise ValueError(f"a prompt of {tokens} tokens and {sampling.max_new_tokens} new ones is beyond {most}.")
        else:
            asked = {"question": messages_or_text} if isinstance(messages_or_text, str) else {"messages": messages_or_text}
            row = {**asked, "images": list(images or ())}
            prompt = read_prompt(self._processor, row, Path(), most, sampling.max_new_tokens)
            text, tokens, tiles = prompt.text, prompt.tokens, prompt.tiles
            own = [decoded(picture) for picture in prompt.pictures]
        needed = self._room.text_bytes(tokens + sampling.max_new_tokens) + self._room.visual_bytes(tiles)
        if not self._room.fits(0, needed):
            raise ValueError(
                f"This request may take {needed} bytes of keys and values, but the engine has {self._room.memory} in all. Ask for "
                "fewer new tokens or about fewer pictures, keep fewer visual tokens, or give the engine more memory."
            )
        request = Request(text, own, sampling, tokens, needed)
        with self._changed:
            self._check_open()
            self._waiting.append((request, 0))
            self._changed.notify_all()
        return request

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, and wait until those that are in are answered.

        Args:
            cancel: answer none of them any further.
        """
        with self._changed:
            self._closing = True
            if cancel:
                for request in [*(request for request, _ in self._waiting), *(row.request for row in self._batch.rows)]:
                    request.cancel()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.close(cancel=kind is not None)

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self._died is None

    def stats(self) -> dict[str, int]:
        """How many requests run and wait, bytes held, pictures encoded, and what has been counted so far."""
        return {
            "running": len(self._batch.rows),
            "waiting": len(self._waiting),
            "held_bytes": self._batch.held_bytes(),
            "picture_bytes": self._pictures.nbytes,
            "pictures_encoded": self._pictures.encoded,
            **self.counts,
        }

    def _check_open(self) -> None:
        if self._died is not None:
            raise EngineClosed(f"The engine's thread has died: {self._died!r}. Make a new engine.")
        if self._closing:
            raise EngineClosed("The engine is closed. Make a new one.")

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                self._step()
        except BaseException as error:  # noqa: BLE001 - whatever ends the thread has to be told to everybody who waits
            self._died = error
        finally:
            closed = self._died or EngineClosed("The engine was closed.")
            with self._changed:
                left = [*(request for request, _ in self._waiting), *(row.request for row in self._batch.rows)]
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
        self._leave([place for place, row in enumerate(self._batch.rows) if row.request.cancelled], "cancelled")
        with self._changed:
            cancelled = [request for request, _ in self._waiting if request.cancelled]
            self._waiting = collections.deque(one for one in self._waiting if not one[0].cancelled)
        for request in cancelled:
            Running(request, Drawer(request.sampling, ()), Writer(self._processor.tokenizer), 0, 0, 0).finish("cancelled")

    def _taken(self) -> int:
        longest = sum(
            self._room.text_bytes(row.request.prompt_tokens + row.request.sampling.max_new_tokens) for row in self._batch.rows
        )
        return longest + sum(row.visual_bytes for row in self._batch.rows)

    def _admit(self) -> None:
        """Read at most one micro-batch of those who have waited longest, all with pictures or all without."""
        if self._full and self._batch.rows:
            return
        self._full = False
        chosen: list[tuple[Request, int]] = []
        taken = self._taken()
        with self._changed:
            while self._waiting and len(chosen) < min(self._micro_batch, self._most - len(self._batch.rows)):
                request, _ = self._waiting[0]
                if chosen and bool(request.pictures) != bool(chosen[0][0].pictures):
                    break
                if not self._room.fits(taken, request.needed) and (chosen or self._batch.rows):
                    break
                taken += request.needed
                chosen.append(self._waiting.popleft())
        if not chosen:
            return
        start = time.monotonic()
        try:
            rows, cache, mask, logits = self._read(chosen)
        except Exception as error:  # noqa: BLE001 - one request's failure is that request's
            self._not_read(chosen, error)
            return
        except SystemExit as error:
            self._not_read(chosen, error)
            return
        self.observe("prefill_seconds", time.monotonic() - start)
        self._batch.join(rows, cache, mask)
        self._write(choose([row.drawer for row in rows], logits), first=len(self._batch.rows) - len(rows))

    def _read(self, chosen: Sequence[tuple[Request, int]]) -> tuple[list[Running], TrimmedCache, torch.Tensor, torch.Tensor]:
        requests = [request for request, _ in chosen]
        prompts = [request.prompt for request in requests]
        if requests[0].pictures:
            share = self.config.tower_share
            encoded = [
                request.pictures if isinstance(request.pictures, Pictures) else self._pictures(request.pictures, share)
                for request in requests
            ]
            inputs = Inputs.about(self._processor, prompts, encoded)
            cache = TrimmedCache(self._model, self.config, pictures=encoded)
        else:
            inputs = Inputs.of(self._processor, prompts, [[] for _ in prompts])
            cache = TrimmedCache(self._model, self.config)
        tensors = {name: tensor.to(self._model.device) for name, tensor in inputs.tensors.items()}
        mask = tensors["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = prefill(self._model, cache, **tensors, position_ids=positions)
        report, ids = cache.report(), inputs.tensors["input_ids"]
        counts = list(zip(report.kept_tokens, report.visible_tokens, strict=True))
        rows = [
            Running(
                request,
                Drawer(request.sampling, own[real.bool()].tolist()),
                Writer(self._processor.tokenizer, tuple(request.sampling.stop)),
                int(kept),
                int(visible),
                self._room.kept_bytes(int(kept)),
                already,
            )
            for (request, already), own, real, (kept, visible) in zip(
                chosen, ids, inputs.tensors["attention_mask"], counts, strict=True
            )
        ]
        return rows, cache, mask, output.logits[:, -1]

    def _not_read(self, chosen: Sequence[tuple[Request, int]], error: BaseException) -> None:
        """Reading has failed: for memory it is tried again with fewer at a time or later, else one by one to find whose it is."""
        full = isinstance(error, Exception) and should_reduce_batch_size(error)
        if len(chosen) == 1 and not (full and self._batch.rows):
            chosen[0][0].fail(error)
            self.counts["failed"] += 1
            self._micro_batch = MICRO_BATCH
            return
        self._full = full and bool(self._batch.rows) and len(chosen) == 1
        self._micro_batch = max(1, len(chosen) // 2) if full else 1
        with self._changed:
            self._waiting.extendleft(reversed(list(chosen)))

    def _step(self) -> None:
        if not self._batch.rows:
            return
        start = time.monotonic()
        try:
            logits = self._batch.step()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - who runs is told, the engine goes on
            self._not_stepped(error)
            return
        self.observe("step_seconds", time.monotonic() - start)
        self._write(choose([row.drawer for row in self._batch.rows], logits), first=0)
        self._micro_batch = min(MICRO_BATCH, 2 * self._micro_batch)

    def _not_stepped(self, error: BaseException) -> None:
        """A step has failed: for memory the newest is put back to be read again later, else all who run are told."""
        if isinstance(error, Exception) and should_reduce_batch_size(error) and len(self._batch.rows) > 1:
            (newest,) = self._batch.leave([len(self._batch.rows) - 1])
            self._full = True
            self.counts["read_again"] += 1
            with self._changed:
                self._waiting.appendleft((newest.request, newest.sent))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return
        for row in self._batch.leave(range(len(self._batch.rows))):
            row.request.fail(error)
            self.counts["failed"] += 1

    def _write(self, tokens: Sequence[int], first: int) -> None:
        """Hand new tokens on, from this row of the batch on; who is finished leaves."""
        self.counts["tokens"] += len(tokens)
        ended: dict[int, str] = {}
        for place, token in enumerate(tokens, start=first):
            reason = self._batch.rows[place].write(token, self._ends)
            if reason is not None:
                ended[place] = reason
        for reason in dict.fromkeys(ended.values()):
            for place in (place for place, own in ended.items() if own == reason):
                self._batch.rows[place].finish(reason)
                self.counts[f"finished_{reason}"] += 1
        if ended:
            self._batch.leave(list(ended))
            self._full = False

    def _leave(self, places: Sequence[int], reason: str) -> None:
        for row in self._batch.leave(places) if places else ():
            row.finish(reason)
            self.counts[f"finished_{reason}"] += 1
        self._full = self._full and not places
