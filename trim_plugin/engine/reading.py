"""Reads prompts: a micro-batch of requests becomes rows that can run, and what is held for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trim_plugin.arithmetic import pictures_at_a_time, pictures_read_together
from trim_plugin.asking.answers import Inputs
from trim_plugin.cache.joining import part_of
from trim_plugin.config import TrimConfig
from trim_plugin.engine.memory import Room
from trim_plugin.engine.request import Held, Request
from trim_plugin.engine.running import Running
from trim_plugin.engine.sampling import Drawer, Writer
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.generation.micro_batches import prefill
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.fingerprint import weights_stay
from trim_plugin.pictures.recent import RecentPictures


class Reader:
    """What prompts are read with.

    Args:
        model, processor, config: as for `Engine`.
        room: counts bytes.
        pictures: encodes pictures, each once.
    """

    def __init__(self, model: Any, processor: Any, config: TrimConfig, room: Room, pictures: RecentPictures) -> None:
        self._model, self._processor, self._config = model, processor, config
        self._room, self._pictures = room, pictures
        vision = model.config.vision_config
        #: Pictures that the tower is given in one call, and those of one micro-batch.
        self._at_a_time = pictures_at_a_time(config.prefill_pictures, vision)
        self.together = pictures_read_together(config.prefill_pictures, vision)

    def read(
        self, chosen: Sequence[tuple[Request, int]]
    ) -> tuple[list[Running], TrimmedCache, torch.Tensor, torch.Tensor]:
        """Read prompts that are alike: all with pictures or all without, with one configuration.

        Args:
            chosen: requests, each with the number of characters of its answer that have been sent.

        Returns:
            The rows, what is held for them, their attention mask (requests, text tokens) and the logits (requests, vocabulary)
            after their last tokens.
        """
        with weights_stay():
            return self._read(chosen)

    def _read(
        self, chosen: Sequence[tuple[Request, int]]
    ) -> tuple[list[Running], TrimmedCache, torch.Tensor, torch.Tensor]:
        requests = [request for request, _ in chosen]
        prompts = [request.prompt for request in requests]
        if requests[0].pictures:
            encoded = self._encoded([request.pictures for request in requests])
            inputs = Inputs.about(self._processor, prompts, encoded)
            cache = TrimmedCache(self._model, requests[0].config)
            cache.show(encoded)  # adapters may have been switched since they came
        else:
            inputs = Inputs.of(self._processor, prompts, [[] for _ in prompts])
            cache = TrimmedCache(self._model, requests[0].config)
        tensors = {name: tensor.to(self._model.device) for name, tensor in inputs.tensors.items()}
        mask = tensors["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = prefill(self._model, cache, **tensors, position_ids=positions)
        report, ids = cache.report(), inputs.tensors["input_ids"]
        counts = list(zip(report.kept_tokens, report.visible_tokens, strict=True))
        rows = [
            Running(
                request,
                Drawer(request.sampling, own[real.bool()].tolist(), request.seed),
                Writer(self._processor.tokenizer, tuple(request.sampling.stop)),
                int(kept),
                int(visible),
                self._room.kept_bytes(int(kept)),
                already,
                held,
            )
            for (request, already), own, real, (kept, visible), held in zip(
                chosen, ids, inputs.tensors["attention_mask"], counts, _held(requests, cache), strict=True
            )
        ]
        return rows, cache, mask, output.logits[:, -1]

    def _encoded(self, pictures: Sequence[Any]) -> list[Pictures]:
        """Every request's pictures: encoded ones as they came, the others by the tower, those of all requests together."""
        shown = [own for own in pictures if not isinstance(own, Pictures)]
        made = iter(self._pictures.several(shown, self._config.tower_share, self._at_a_time) if shown else ())
        return [own if isinstance(own, Pictures) else next(made) for own in pictures]


def _held(requests: Sequence[Request], cache: TrimmedCache) -> list[Held | None]:
    """What is held of the pictures of each request that tells it; None for the others."""
    if not any(request.tells_held for request in requests):
        return [None] * len(requests)
    most = max(request.shown for request in requests)
    found: list[Held | None] = []
    for place, request in enumerate(requests):
        if not request.tells_held:
            found.append(None)
            continue
        own = part_of(cache, slice(place, place + 1))
        report = own.report()
        # Those of fewer pictures are padded to as many as the others have.
        total, stock = (
            count * request.shown // most if request.shown else 0
            for count in (report.total_tokens[0], report.stock_cross_kv_bytes)
        )
        found.append(Held(own.kept_indices[0].tolist(), total, report.cross_kv_bytes, stock))
    return found
