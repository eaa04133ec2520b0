"""The running batch: requests of unequal texts that take a decoding step together, joining and leaving as they come and end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trim_plugin.cache.joining import cut_left, join_running, part_of
from trim_plugin.cache.report import held_bytes, stored_tensors
from trim_plugin.compat import CACHE
from trim_plugin.config import TrimConfig
from trim_plugin.engine.request import Finished, Held, Request
from trim_plugin.engine.sampling import Drawer, Writer
from trim_plugin.forward.hooks import TrimmedCache

#: Positions at the left that no running text needs are cut off once there are this many.
CUT = 64
#: What is held of those who have ended is let go once it is this share of all, or when others join: it costs a copy of the rest.
ENDED_SHARE = 0.25


@dataclasses.dataclass
class Running:
    """A request that is being answered."""

    request: Request
    drawer: Drawer
    writer: Writer
    kept: int
    visible: int
    #: Bytes of its visual tokens' keys and values.
    visual_bytes: int
    #: Characters that were sent already, before it had to be read again.
    already: int = 0
    held: Held | None = None

    def write(self, token: int, ends: set[int]) -> str | None:
        """Send what a new token brings; the reason to finish, if there is one."""
        ended = token in ends
        if not ended:
            self._send(self.writer.add(token))
        if self.writer.stopped or ended:
            return "stop"
        return "length" if len(self.drawer.tokens) >= self.request.sampling.max_new_tokens else None

    def finish(self, reason: str) -> None:
        """Hand the whole answer on."""
        self._send(self.writer.end())
        reason = "stop" if self.writer.stopped and reason == "length" else reason
        tokens, prompt = list(self.drawer.tokens), self.request.prompt_tokens
        self.request.finish(Finished(self.writer.text, reason, tokens, prompt, self.kept, self.visible, self.held))

    def _send(self, text: str) -> None:
        start = len(self.writer.text) - len(text)
        self.request.send(text[max(0, self.already - start) :])

    @property
    def sent(self) -> int:
        """Characters that have been sent."""
        return max(self.already, len(self.writer.text))


class RunningBatch:
    """Who is being answered, and what is held for them.

    Args:
        model: an Mllama model, or a wrapper around one.
        config: of the trimmed cache.
    """

    def __init__(self, model: Any, config: TrimConfig) -> None:
        self._model, self._config = model, config
        self.rows: list[Running] = []
        #: Where each stands in what is held: some have ended and are still in it.
        self._places: list[int] = []
        #: The same on the device, once a step needs it.
        self._there: torch.Tensor | None = None
        self._cache: TrimmedCache | None = None
        self._mask = torch.empty(0, 0, dtype=torch.long, device="cpu")

    def join(self, rows: Sequence[Running], cache: TrimmedCache, mask: torch.Tensor) -> None:
        """Take in requests whose prompts have been read.

        Args:
            rows: the requests; the first token of each has been drawn.
            cache: what their prompts have left; emptied here.
            mask: int64 (requests, text tokens), 0 for padding.
        """
        self.tidy()
        if self._cache is None:
            self._cache, self._mask = TrimmedCache(self._model, self._config), mask[:0]
        own, other = join_running(self._cache, cache)
        before = torch.nn.functional.pad(self._mask, (own, 0)) if len(self.rows) else self._mask.new_empty(0, 0)
        coming = torch.nn.functional.pad(mask, (other, 0))
        self._mask = torch.cat([before, coming]) if len(self.rows) else coming
        self.rows += rows
        self._places = list(range(len(self.rows)))

    def step(self) -> torch.Tensor:
        """One forward with everybody's last token: logits (requests, vocabulary).

        If it fails, what is held is as it was.
        """
        held, length = self._mask.shape
        tokens = [0] * held
        for place, row in zip(self._places, self.rows, strict=True):
            tokens[place] = row.drawer.tokens[-1]
        try:
            logits, mask = self._forward(self._cache, self._mask, tokens)
        except BaseException:
            self._take_back(length)
            raise
        self._mask = mask
        if len(self.rows) == held:
            return logits
        if self._there is None:
            self._there = torch.tensor(self._places, device=logits.device)
        return logits.index_select(0, self._there)

    def failing(self) -> dict[int, BaseException]:
        """Whose step fails when it is taken alone, and how. What is held stays as it is.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        found: dict[int, BaseException] = {}
        if self._cache is None:
            return found
        for number, (place, row) in enumerate(zip(self._places, self.rows, strict=True)):
            own = slice(place, place + 1)
            try:
                self._forward(part_of(self._cache, own), self._mask[own], row.drawer.tokens[-1:])
            except torch.AcceleratorError:
                raise
            except BaseException as error:  # noqa: BLE001 - this request's failure
                found[number] = error
        return found

    def _forward(
        self, cache: TrimmedCache | None, mask: torch.Tensor, tokens: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after the last token of each, and the mask with it."""
        ids = torch.tensor([[token] for token in tokens], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        with torch.no_grad():
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                **{CACHE: cache},
                use_cache=True,
                return_dict=True,
            )
        return output.logits[:, -1], mask

    def _take_back(self, length: int) -> None:
        if self._cache is None:
            return
        for index in self._cache.self_layers:
            layer = self._cache.layers[index]
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def forget(self) -> list[Running]:
        """Let everybody go, and all that is held."""
        rows, self.rows, self._places, self._there = self.rows, [], [], None
        self._cache, self._mask = None, torch.empty(0, 0, dtype=torch.long, device="cpu")
        return rows

    def leave(self, places: Sequence[int], at_once: bool = False) -> list[Running]:
        """Let these rows go.

        Args:
            places: in `rows`.
            at_once: whether what is held of them goes now; else it may stay for some steps, which costs less than going alone.
        """
        gone = [self.rows[place] for place in places]
        stay = [place for place in range(len(self.rows)) if place not in set(places)]
        self.rows, self._places = [self.rows[place] for place in stay], [self._places[place] for place in stay]
        self._there = None
        held = self._mask.shape[0]
        if not stay:
            self.forget()
        elif at_once or held - len(stay) >= ENDED_SHARE * held:
            self.tidy()
        return gone

    def tidy(self) -> None:
        """Hold nothing of those who have ended."""
        if self._cache is None or len(self.rows) == self._mask.shape[0]:
            return
        chosen = torch.tensor(self._places, device="cpu")
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask.index_select(0, chosen.to(self._mask.device))
        self._places, self._there = list(range(len(self.rows))), None
        self._cut()

    def _cut(self) -> None:
        """Drop positions that are padding in every text."""
        used = max(row.request.prompt_tokens + len(row.drawer.tokens) - 1 for row in self.rows)
        unused = self._mask.shape[1] - used
        if unused >= CUT and self._cache is not None:
            cut_left(self._cache, unused)
            self._mask = self._mask[:, unused:]

    def held_bytes(self) -> int:
        """Bytes of all keys and values that are held."""
        if self._cache is None:
            return 0
        own = [tensor for index in self._cache.self_layers for tensor in stored_tensors(self._cache.layers[index])]
        cross = [tensor for index in self._cache.cross_layers for tensor in self._cache.layers[index].held_tensors()]
        return held_bytes([*own, *cross])
