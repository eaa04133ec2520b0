"""Llama-3.2-Vision with a trimmed cache as a model of lmms-eval, which runs the benchmarks of the paper.

    python -m lmms_eval --model llama_vision_trimmed --tasks mmvp --batch_size 1 --output_path results/0.25 \
        --model_args pretrained=meta-llama/Llama-3.2-11B-Vision-Instruct,top_k_ratio=0.25,dtype=bfloat16

It builds prompts as lmms-eval's own `llama_vision` does: the pictures, then the text, in the chat format, no system prompt;
greedy decoding unless the task says otherwise. Where it differs: batches, `until` is obeyed, videos are refused, and several
questions about one picture run the vision tower once (not with `top_k_ratio=stock`).
`python -m trim_plugin.integrations.lmms_eval_table` compares the result files.

The interface is lmms-eval's `api.model.lmms` as of 0.7.3.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from trim_plugin.asking.answers import Inputs, answer
from trim_plugin.commands.loading import device_of, process_of
from trim_plugin.config import TrimConfig
from trim_plugin.integrations import accelerate
from trim_plugin.pictures.prompting import written
from trim_plugin.pictures.recent import RecentPictures
from trim_plugin.pictures.rgb import to_rgb
from trim_plugin.selection.k_center import KCenter

STOCK = "stock"
DTYPES = {"auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MAX_NEW_TOKENS = 1024

Entry = TypeVar("Entry")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as it is answered: the prompt in the chat format, its pictures, and the task's generation settings."""

    prompt: str
    pictures: list[Image.Image]
    settings: dict[str, Any]

    @property
    def group(self) -> tuple[int, str]:
        """Equal for requests that can share a batch."""
        return len(self.pictures), json.dumps(self.settings, sort_keys=True, default=str)


class LlamaVisionTrimmed(lmms):
    """`llama_vision` of lmms-eval with a trimmed cross-attention cache.

    Args:
        pretrained: model folder or hub id.
        top_k_ratio: the paper's rule, in (0, 1]; 1.0 is exact mode, "stock" is transformers' own cache.
        kept_share: in (0, 1]; keep this share of the visible tokens with `KCenter`. 0.35 where no rule is given.
        radius: in (0, 1]; `KCenter(radius=…)`, instead of either.
        kv_quantization: "int8" or "nf4" for the kept tokens' keys and values; None for the model's dtype.
        weights: "nf4", "fp4" or "int8" quantizes the weights with bitsandbytes; None loads them in `dtype`.
        dtype: "bfloat16", "float16", "float32" or "auto" (bfloat16); with quantized weights, what is computed in.
        device: "cuda", "cuda:0", "cpu"; under `accelerate launch`, "cuda" means one GPU a process.
        device_map: as transformers takes it ("auto", …); overrides `device`.
        batch_size: questions answered together. Batches hold only questions with the same number of pictures.
        revision: of the model on the hub.
        attn_implementation: "sdpa" or "eager".
        encoded_gib: GiB of main memory for encoded pictures, whole: one that is asked about again while it is held there does not
            go through the vision tower again, which changes no answer. 0 reads pictures anew each time, as stock does.
        report_to: a JSON Lines file to which every batch's tokens, bytes and seconds are appended.

    Raises:
        ValueError: an unknown or wrong argument.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "meta-llama/Llama-3.2-11B-Vision-Instruct",
        top_k_ratio: float | str | None = None,
        kept_share: float | None = None,
        radius: float | None = None,
        kv_quantization: str | None = None,
        weights: str | None = None,
        dtype: str = "auto",
        device: str = "cuda",
        device_map: str = "",
        batch_size: int | str = 1,
        revision: str = "main",
        attn_implementation: str = "sdpa",
        encoded_gib: float = 1.0,
        report_to: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"Unknown model argument {next(iter(unknown))!r} of llama_vision_trimmed.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
        self.trimming = trimming(top_k_ratio, kv_quantization, kept_share, radius)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive number, got {batch_size!r}.")
        if not isinstance(encoded_gib, int | float) or not 0 <= encoded_gib < math.inf:
            raise ValueError(f"encoded_gib must be a number of GiB, 0 or more, got {encoded_gib!r}.")
        self.batch_size = int(batch_size)
        """Questions answered together."""
        self._rank, self._world_size = process_of(os.environ)
        self.device = torch.device(device_of(device, os.environ))
        self._report_to = report_to
        self.model, self.processor = accelerate.load(
            pretrained,
            weights or DTYPES[dtype],
            device_map=device_map or {"": str(self.device)},
            dtype=accelerate.DTYPES[DTYPES[dtype]],
            attention=attn_implementation,
            revision=revision,
        )
        most_bytes = 0 if self.trimming is None else int(encoded_gib * 2**30)
        self._recent = RecentPictures(self.model, self.processor, most_bytes) if most_bytes else None

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests whose arguments are (text, generation settings, doc_to_visual, doc id, task, split)."""
        texts: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        prepared = ((index, self._prepare(request.args)) for index, request in enumerate(requests))
        for batch in batches(prepared, lambda entry: entry[1].group, self.batch_size):
            answers = self._answer([asked for _, asked in batch])
            for (index, _), text in zip(batch, answers, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", tuple(requests[index].args[:2]), text)
            bar.update(len(batch))
        bar.close()
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Not offered, nor are several rounds, as in lmms-eval's own `llama_vision`: use tasks that generate.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("llama_vision_trimmed answers tasks of the type generate_until only.")

    generate_until_multi_round = loglikelihood

    def _prepare(self, arguments: tuple[Any, ...]) -> Asked:
        text, settings, doc_to_visual, doc_id, task, split = arguments
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        pictures = [to_rgb(visual) for visual in visuals if isinstance(visual, Image.Image)]
        if len(pictures) != len(visuals):
            raise ValueError(f"Task {task!r} gives something else than pictures; llama_vision_trimmed reads no videos.")
        return Asked(written(self.processor, text, len(pictures)), pictures, dict(settings))

    def _answer(self, batch: list[Asked]) -> list[str]:
        start, encoded = time.perf_counter(), self._encoded
        settings = batch[0].settings
        chosen = generation_settings(settings)
        with torch.no_grad():
            inputs = self._inputs(batch)
            answers, cache = answer(
                self.model, self.processor, inputs, self.trimming, chosen.pop("max_new_tokens"), **chosen
            )
        figures = {"seconds": round(time.perf_counter() - start, 6), "encoded": self._encoded - encoded}
        self._report(cache, {"questions": len(batch), **figures})
        return [cut(own.text, settings.get("until")) for own in answers]

    @property
    def _encoded(self) -> int:
        """How often a picture went through the vision tower on its own, to be remembered."""
        return 0 if self._recent is None else self._recent.encoded

    def _inputs(self, batch: list[Asked]) -> Inputs:
        prompts, pictures = [asked.prompt for asked in batch], [asked.pictures for asked in batch]
        if self._recent is not None and pictures[0]:
            return Inputs.about(self.processor, prompts, [self._recent(own) for own in pictures])
        return Inputs.of(self.processor, prompts, pictures)

    def _report(self, cache: Any, figures: dict[str, Any]) -> None:
        if self._report_to is None or self.trimming is None:
            return
        report = cache.report()
        told = ("visible_tokens", "kept_tokens", "cross_kv_bytes", "stock_cross_kv_bytes")
        line = figures | {name: getattr(report, name) for name in told}
        with open(self._report_to, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def trimming(
    top_k_ratio: float | str | None,
    kv_quantization: str | None,
    kept_share: float | None = None,
    radius: float | None = None,
) -> TrimConfig | None:
    """The configuration that model arguments ask for; None for stock.

    Raises:
        ValueError: a value that is not allowed, two rules at once, or KV quantization of stock's cache.
    """
    rules = {"top_k_ratio": top_k_ratio, "kept_share": kept_share, "radius": radius}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: they name different rules. Choose one.")
    if kept_share is not None or radius is not None:
        return TrimConfig(processors=(KCenter(kept_share, radius=radius),), kv_quantization=kv_quantization)
    if top_k_ratio == STOCK:
        if kv_quantization is not None:
            raise ValueError("kv_quantization needs a trimmed cache: give top_k_ratio=1.0 instead of stock.")
        return None
    if isinstance(top_k_ratio, str):
        raise ValueError(f"top_k_ratio must be a number in (0, 1] or {STOCK!r}, got {top_k_ratio!r}.")
    return TrimConfig(top_k_ratio=top_k_ratio, kv_quantization=kv_quantization)


def batches(entries: Iterable[Entry], group: Callable[[Entry], Hashable], size: int) -> Iterator[list[Entry]]:
    """Entries that can be answered together: of one group, at most `size`; no more are held than wait for company."""
    waiting: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        batch = waiting.setdefault(group(entry), [])
        batch.append(entry)
        if len(batch) == size:
            yield waiting.pop(group(entry))
    yield from waiting.values()


def generation_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation settings as `generate` takes them; greedy unless the task samples, as in `llama_vision`."""
    temperature = settings.get("temperature") or 0
    sample = bool(settings.get("do_sample", False)) and temperature > 0
    chosen = {
        "max_new_tokens": settings.get("max_new_tokens") or MAX_NEW_TOKENS,
        "num_beams": settings.get("num_beams") or 1,
        "do_sample": sample,
    }
    # Unset for greedy decoding: a checkpoint's own sampling defaults would only cause warnings.
    return chosen | {"temperature": temperature if sample else None, "top_p": settings.get("top_p") if sample else None}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the strings at which a task wants it to stop."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text
