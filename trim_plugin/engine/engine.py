"""Continuous batching: many requests at once on one model, each as if it were alone.

One thread owns the model. Between two decoding steps it reads at most one micro-batch of prompts, so that nobody who is being
answered waits longer than that. First come, first served; who does not fit yet waits.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trim_plugin.asking.prompts import decoded, read_prompt
from trim_plugin.config import TrimConfig
from trim_plugin.engine.cores import release_idle_workers
from trim_plugin.engine.ignored import warn_of_ignored
from trim_plugin.engine.memory import Room, Taken
from trim_plugin.engine.request import Request, Sampling
from trim_plugin.engine.scheduler import EngineClosed, Scheduler
from trim_plugin.forward.finding import find_text_model
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.layout import prompt_inputs
from trim_plugin.pictures.recent import DEFAULT_BYTES, RecentPictures
from trim_plugin.selection.k_center import KCenter

#: Requests that run at once unless something else is said.
MAX_RUNNING = 32
#: What a request may want otherwise than the engine: it decides what is kept, not how it is held.
OWN_SETTINGS = ("kept_share", "top_k_ratio", "merge")


def can_run(config: TrimConfig) -> bool:
    """Whether its caches can grow and shrink as an engine's batch does.

    Example:
        >>> can_run(TrimConfig(top_k_ratio=0.25)), can_run(TrimConfig(top_k_ratio=0.25, static=True))
        (True, False)
    """
    return not config.static and config.self_kv_quantization is None


def running_config(config: TrimConfig | Mapping[str, Any] | None) -> TrimConfig:
    """A configuration that an engine can have.

    Raises:
        ValueError: a value is not allowed, or does not go with a batch that others join and leave.

    Example:
        >>> running_config({"top_k_ratio": 0.25}).top_k_ratio
        0.25
    """
    found = TrimConfig.of(config)
    if not can_run(found):
        raise ValueError(
            "An Engine's batch grows and shrinks, which static caches and transformers' quantized layers cannot. Use "
            "TrimConfig(static=False, self_kv_quantization=None)."
        )
    return found


class Engine:
    """Answers many requests at once on one model.

    What a token is chosen by is each request's to say (`Sampling`). A model whose `generation_config` changes greedy answers, by
    `no_repeat_ngram_size` for instance, is answered without that, and a warning names it.

    Args:
        model: an Mllama model with a vision tower, or a wrapper around one (adapters count as they are). Nobody else may use it
            meanwhile.
        processor: its `MllamaProcessor`.
        config: of the trimmed caches; a dict of `TrimConfig`'s fields does as well.
        memory: bytes that keys and values of running requests may take, on all devices together; None takes most of what each
            GPU has free that holds a part of the model, and counts on each what its layers keep there.
        max_running: requests that run at once.
        picture_bytes: bytes of encoded pictures that are held, in main memory, for requests that ask about them again.
        picture_folder: where they are kept on disk as well, for later runs; None keeps none.

    Raises:
        ValueError: settings that running batches don't go with (`static`, `self_kv_quantization`), or a model without a tower.
        OSError: the folder cannot be made.

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
        picture_folder: Path | str | None = None,
    ) -> None:
        self.config = running_config(config)
        for name, value in (("memory", memory), ("max_running", max_running)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        find_text_model(model)
        self._model, self._processor = model, processor
        self._room = Room(model, self.config, memory)
        pictures = RecentPictures(model, processor, most_bytes=picture_bytes, folder=picture_folder)
        self._scheduler = Scheduler(model, processor, self.config, self._room, max_running or MAX_RUNNING, pictures)
        warn_of_ignored(model.generation_config)
        release_idle_workers()
        self._scheduler.thread.start()

    # -- what callers use, from any thread -----------------------------------------------------------------------------

    def submit(
        self,
        messages_or_text: str | Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        pictures: Pictures | None = None,
        cache_config: Mapping[str, Any] | None = None,
        listener: Callable[[str | None], None] | None = None,
        tell_held: bool = False,
        **settings: Any,
    ) -> Request:
        """Ask something.

        Args:
            messages_or_text: a question; or messages of a chat, whose parts `{"type": "image"}` stand for the pictures in order.
            images: pictures, files of pictures, or their bytes.
            pictures: encoded pictures instead.
            cache_config: what this request wants otherwise than the engine's configuration says, of `OWN_SETTINGS`: fields of
                `TrimConfig`, and `kept_share` for `KCenter` with that share.
            listener: called by the engine's thread with every piece of text, and with None at the end. It must not wait.
            tell_held: whether the answer says which visual tokens are kept and what they take (`Held`). That is read from the
                device once a prompt, so ask for it only where it is looked at.
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
        config = self._config_of(cache_config)
        if images and pictures is not None:
            raise ValueError("Give images or encoded pictures, not both.")
        self._scheduler.check_open()
        most = self._model.config.get_text_config().max_position_embeddings
        if pictures is not None:
            pictures.check_fits(self._model)
            ids = prompt_inputs(self._processor, [pictures.tiles], [messages_or_text], pictures.most_tiles)["input_ids"]
            text, tokens, tiles = messages_or_text, ids.shape[1], sum(pictures.tiles)
            own: Any = pictures
            if tokens + sampling.max_new_tokens > most:
                raise ValueError(
                    f"a prompt of {tokens} tokens and {sampling.max_new_tokens} new ones is beyond {most}."
                )
        else:
            asked = (
                {"question": messages_or_text} if isinstance(messages_or_text, str) else {"messages": messages_or_text}
            )
            row = {**asked, "images": list(images or ())}
            prompt = read_prompt(self._processor, row, Path(), most, sampling.max_new_tokens)
            text, tokens, tiles = prompt.text, prompt.tokens, prompt.tiles
            own = [decoded(picture) for picture in prompt.pictures]
        held = None if pictures is None else len(pictures.index)
        visual = self._room.visual_bytes(tiles, config, held)
        needed = Taken(self._room.text_bytes(tokens + sampling.max_new_tokens), visual)
        lacking = self._room.lacking(Taken(), needed)
        if lacking is not None:
            raise ValueError(
                f"This request may take {lacking}. Ask for fewer new tokens or about fewer pictures, keep fewer visual tokens, "
                "or give the engine more memory."
            )
        request = Request(text, own, sampling, config, tokens, needed, listener, tell_held)
        self._scheduler.put(request)
        return request

    def _config_of(self, own: Mapping[str, Any] | None) -> TrimConfig:
        """The configuration that a request's prompt is read with."""
        if not own:
            return self.config
        closed = sorted(set(own) - set(OWN_SETTINGS))
        if closed:
            raise ValueError(f"cache_config: {closed[0]!r} is the engine's. Allowed: {', '.join(OWN_SETTINGS)}.")
        # None is what clients write where they ask for nothing.
        given = dict(own)
        shares = {name: given.pop(name, None) for name in ("kept_share", "top_k_ratio")}
        rules = [name for name, value in shares.items() if value is not None]
        if len(rules) > 1:
            raise ValueError(
                f"cache_config: {' and '.join(rules)} are both given: they name different rules. Choose one."
            )
        if rules == ["kept_share"]:
            given |= {"top_k_ratio": None, "processors": (KCenter(shares["kept_share"]),)}
        elif rules:
            given |= {"top_k_ratio": shares["top_k_ratio"], "processors": None}
        return dataclasses.replace(self.config, **given)

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, and wait until those that are in are answered.

        Args:
            cancel: answer none of them any further.
        """
        self._scheduler.close(cancel)
        if threading.current_thread() is not self._scheduler.thread:
            self._scheduler.thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.close(cancel=kind is not None)

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return self._scheduler.thread.is_alive() and self._scheduler.died is None

    def stats(self) -> dict[str, int]:
        """How many requests run and wait, bytes held, pictures encoded, and what has been counted so far."""
        return self._scheduler.stats()


__all__ = ["MAX_RUNNING", "OWN_SETTINGS", "Engine", "EngineClosed", "can_run", "running_config"]
