"""Makes arguments of `generate` out of prompts and pictures, and answers with their counts out of what it returns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image

from trim_plugin.asking import first_line
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.config import TrimConfig
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.layout import prompt_inputs
from trim_plugin.pictures.prompting import tensors_of

#: Failures that are no question's own, since they would be those of all that follow: a device that is lost; a disk that is full,
#: or gone. Pictures are read before, and what is wrong with their files is a `RowError`.
OF_ALL = (torch.AcceleratorError, OSError)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Prompts that go through one `generate`: each has as many pictures.

    Args:
        tensors: what the processor returns, padded on the left.
        encoded: for every prompt its pictures, where they are encoded; `tensors` then hold no pixels.
    """

    tensors: Mapping[str, torch.Tensor]
    encoded: tuple[Pictures, ...] = ()

    @classmethod
    def of(cls, processor: Any, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Inputs:
        """Inputs of prompts as the tokenizer gets them, with each one's pictures, RGB, which `generate` is to read."""
        return cls(tensors_of(processor, prompts, pictures))

    @classmethod
    def about(cls, processor: Any, prompts: Sequence[str], encoded: Sequence[Pictures]) -> Inputs:
        """Inputs of prompts about encoded pictures, one `Pictures` for each."""
        tiles = [own.tiles for own in encoded]
        return cls(prompt_inputs(processor, tiles, prompts, encoded[0].most_tiles), tuple(encoded))

    def arguments(self, model: Any, config: TrimConfig | None) -> dict[str, Any]:
        """Arguments of `generate`, on the model's device and in its dtype; without a config for transformers' own cache."""
        placed: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in self.tensors.items()}
        if "pixel_values" in placed:
            placed["pixel_values"] = placed["pixel_values"].to(model.dtype)
        if self.encoded:
            return {**placed, CACHE: TrimmedCache(model, config, pictures=list(self.encoded))}
        if config is None:
            return placed
        return {**placed, "cache_implementation": "trimmed", "cache_config": config}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Args:
        text: the answer.
        tokens: generated text tokens, the end token included.
        prompt_tokens: text tokens of the prompt.
        visible: visual tokens that the text may read; 0 for transformers' own cache, which does not count them.
        kept: those that decoding could read.
        seconds: wall-clock time of `generate`, vision tower and prefill included, shared among its prompts.
    """

    text: str
    tokens: int
    prompt_tokens: int
    visible: int
    kept: int
    seconds: float

    def result(self) -> dict[str, Any]:
        """As it stands in a file of results."""
        figures = dataclasses.asdict(self)
        return {"answer": figures.pop("text").strip(), **figures, "seconds": round(self.seconds, 4)}


def answer(
    model: Any,
    processor: Any,
    inputs: Inputs,
    config: TrimConfig | None,
    max_new_tokens: int,
    **settings: Any,
) -> tuple[list[Answer], Any]:
    """Generate once, greedily unless the settings say otherwise.

    Args:
        model: an Mllama model or a wrapper around one.
        processor: its `MllamaProcessor`.
        inputs: of the prompts.
        config: of the trimmed cache; None is transformers' own.
        max_new_tokens: longest answer.
        settings: other arguments of `generate`.

    Returns:
        An answer for every prompt, and the cache.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> from trim_plugin.pictures.prompting import open_picture, written
        >>> model, processor = load_small_model()
        >>> first = examples()[0]
        >>> inputs = Inputs.of(processor, [written(processor, first.question, 1)], [[open_picture(first.picture)]])
        >>> (own,), cache = answer(model, processor, inputs, TrimConfig(top_k_ratio=0.1), 8)
        >>> own.result()["answer"] == first.answer, own.kept == cache.report().kept_tokens[0] < own.visible
        (True, True)
    """
    prompts, length = inputs.tensors["input_ids"].shape
    _wait(model)
    start = time.perf_counter()
    output = model.generate(
        **inputs.arguments(model, config),
        **{"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, **settings},
        return_dict_in_generate=True,
    )
    _wait(model)
    seconds = (time.perf_counter() - start) / prompts
    cache = cache_of(output)
    counts = [(0, 0)] * prompts
    if isinstance(cache, TrimmedCache) and "cross_attention_mask" in inputs.tensors:
        report = cache.report()
        counts = [(int(a), int(b)) for a, b in zip(report.visible_tokens, report.kept_tokens, strict=True)]
    end, answers = model.generation_config.eos_token_id, []
    ends = set(end) if isinstance(end, list | tuple) else {end}
    for sample, written in enumerate(output.sequences[:, length:].tolist()):
        tokens = _until_end(written, ends)
        text = processor.decode(tokens, skip_special_tokens=True)
        read = int(inputs.tensors["attention_mask"][sample].sum())
        answers.append(Answer(text, len(tokens), read, *counts[sample], seconds))
    return answers, cache


def told(error: BaseException) -> str:
    """What went wrong with one question, in a line.

    Example:
        >>> told(MemoryError("no room")), told(RuntimeError("shapes differ")), told(KeyError("x"))
        ('out of memory, even alone: no room', 'shapes differ', "KeyError: 'x'")
    """
    kind, said = type(error).__name__, first_line(error)
    if is_full(error):
        return f"out of memory, even alone: {said}"
    if isinstance(error, SystemExit):
        return f"the model's code asked to exit: {said}"
    # Of these the sentence says enough: most are written for users.
    plain = isinstance(error, RuntimeError | ValueError | TypeError | IndexError)
    return said if plain or said == kind else f"{kind}: {said}"


def is_full(error: BaseException) -> bool:
    """Whether a failure says that memory was not enough.

    Example:
        >>> is_full(torch.OutOfMemoryError("CUDA out of memory.")), is_full(ValueError("no"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def _wait(model: Any) -> None:
    """For times that count: until the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token and with it.

    Example:
        >>> _until_end([5, 2, 0, 0], {2})
        [5, 2]
    """
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]
