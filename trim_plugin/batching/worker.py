"""The worker behind every way of answering many rows: the command line, Ray, a server's batches, a loop of one's own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trim_plugin.asking.prompts import Prompt, decoded, read_prompt
from trim_plugin.asking.rows import Row, RowError
from trim_plugin.batching.sizing import pictures_at_a_time
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.config import TrimConfig
from trim_plugin.forward.trimmed_cache import TrimmedCache
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.layout import prompt_inputs

#: A row's place among those that the worker was called with, and its prompt.
Placed = tuple[int, Prompt]


class Worker:
    """Answers rows greedily with the trimmed cache: made once, called with as many rows as one likes.

    Rows of as many pictures, of like tiles and length, go through one `generate`. Where memory runs out, the batch is halved, and
    so are the batches after it. A row that cannot be answered becomes an error in its own result.

    Args:
        model: an Mllama model or a wrapper around one, in eval mode, on its device.
        processor: its `MllamaProcessor`.
        config: of the trimmed cache, as `generate` takes it.
        batch_size: most pictures of one `generate` (a row without pictures counts as one); None: what the planner says that
            fits into the memory at hand.
        max_new_tokens: longest answer, in text tokens, of rows that don't say.
        folder: what relative names of pictures start from.
        encode: what encodes a row's pictures, where they are to be remembered: a `batching.remembered.PictureFolder` or a
            `pictures.recent.RecentPictures`. None reads them anew for every row.

    Raises:
        ValueError: a number is not positive, the configuration has a value that is not allowed, or `encode` is given with a
            static cache.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> worker = Worker(*load_small_model(), {"top_k_ratio": 0.25}, batch_size=8)
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
        batch_size: int | None = None,
        max_new_tokens: int = 128,
        folder: Path | str = ".",
        encode: Callable[[Sequence[Image.Image]], Pictures] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        self.model = model
        self.processor = processor
        self.config = TrimConfig.of(config)
        self.max_new_tokens = max_new_tokens
        self.folder = Path(folder)
        self.encode = encode
        if encode is not None and self.config.static:
            raise ValueError(
                "encode and static=True are both given, but a static cache is made by generate. Choose one."
            )
        self._most_tokens = int(model.config.get_text_config().max_position_embeddings)
        self.batch_size = batch_size or pictures_at_a_time(model, self.config, max_new_tokens)

    def __call__(self, rows: Sequence[Row | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The results of rows, in their order.

        Args:
            rows: see `asking.rows.Row.of`.

        Returns:
            For every row its "id", if it has one, and either "error", a sentence, or "answer" with "tokens" (generated),
            "prompt_tokens", "visible" (visual tokens that the text may read), "kept" (those that decoding read) and "seconds"
            (the batch's, shared among its rows).
        """
        placed = [answer for answers in self.answers(rows) for answer in answers]
        return [result for _, result in sorted(placed, key=lambda answer: answer[0])]

    def answers(self, rows: Sequence[Row | Mapping[str, Any]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """The same as they come, some at a time: each with the row's place in `rows`."""
        prompts: list[Placed] = []
        refused: list[tuple[int, dict[str, Any]]] = []
        for place, row in enumerate(rows):
            try:
                prompt = read_prompt(self.processor, row, self.folder, self._most_tokens, self.max_new_tokens)
                prompts.append((place, prompt))
            except RowError as error:
                refused.append((place, {**_id(row), "error": str(error)}))
        if refused:
            yield refused
        waiting = deque(sorted(prompts, key=lambda placed: _likeness(placed[1])))
        with ThreadPoolExecutor(max_workers=1) as reader:
            following = self._read_next(reader, waiting)
            while following is not None:
                batch, reading = following
                following = None
                inputs, failed = reading.result()
                del reading
                # The next batch's pictures are decoded while this one is answered.
                following = self._read_next(reader, waiting)
                yield [
                    (place, {**_id(rows[place]), **result}) for place, result in self._answered(batch, inputs, failed)
                ]

    def _read_next(
        self, reader: ThreadPoolExecutor, waiting: deque[Placed]
    ) -> tuple[list[Placed], Future[tuple[dict[str, Any], dict[int, str]]]] | None:
        """Take the next batch of what is waiting, and begin to read it."""
        if not waiting:
            return None
        batch = [waiting.popleft()]
        pictures = len(batch[0][1].pictures)
        most = max(1, self.batch_size // max(1, pictures))
        while waiting and len(batch) < most and len(waiting[0][1].pictures) == pictures:
            batch.append(waiting.popleft())
        return batch, reader.submit(self._read, batch)

    def _read(self, batch: Sequence[Placed]) -> tuple[dict[str, Any], dict[int, str]]:
        """Inputs of the rows whose pictures can be read, on the CPU, and what is wrong with the others."""
        pictures, texts, failed = [], [], {}
        for place, prompt in batch:
            try:
                pictures.append([decoded(source) for source in prompt.pictures])
                texts.append(prompt.text)
            except RowError as error:
                failed[place] = str(error)
        if not texts:
            return {}, failed
        if self.encode is not None and pictures[0]:
            return {"pictures": pictures, "texts": texts}, failed
        # A chat format writes the special tokens itself.
        settings = {
            "padding": True,
            "padding_side": "left",
            "add_special_tokens": not getattr(self.processor, "chat_template", None),
            "return_tensors": "pt",
        }
        if not pictures[0]:
            tokenized = self.processor.tokenizer(texts, **settings)
            return {name: tokenized[name] for name in ("input_ids", "attention_mask")}, failed
        return dict(self.processor(images=pictures, text=texts, **settings)), failed

    def _answered(
        self, batch: Sequence[Placed], inputs: dict[str, Any], failed: Mapping[int, str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, error in failed.items():
            yield place, {"error": error}
        batch = [placed for placed in batch if placed[0] not in failed]
        if not batch:
            return
        results, error, full = self._tried([prompt for _, prompt in batch], inputs)
        if results is not None:
            yield from zip((place for place, _ in batch), results, strict=True)
            return
        if full:
            _free_memory()
        if len(batch) == 1:
            yield batch[0][0], {"error": error}
            return
        middle = len(batch) // 2
        if full:
            self.batch_size = max(1, middle * len(batch[0][1].pictures))
        for half in (batch[:middle], batch[middle:]):
            yield from self._answered(half, *self._read(half))

    def _tried(
        self, prompts: Sequence[Prompt], inputs: dict[str, Any]
    ) -> tuple[list[dict[str, Any]] | None, str, bool]:
        """The results; or None, what went wrong, and whether that was memory. No frame of the failure outlives this."""
        try:
            return self._generate(prompts, inputs), "", False
        except torch.AcceleratorError:
            raise  # the device is lost, for all rows that follow too
        except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
            full = _is_out_of_memory(error)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            return None, f"out of memory, even alone: {said}" if full else said, full

    def _generate(self, prompts: Sequence[Prompt], inputs: dict[str, Any]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        placed = self._encoded(**inputs) if "texts" in inputs else self._placed(inputs)
        most = [prompt.max_new_tokens or self.max_new_tokens for prompt in prompts]
        output = self.model.generate(
            **placed,
            max_new_tokens=max(most),
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=True,
        )
        report = cache_of(output).report()
        written = output.sequences[:, placed["input_ids"].shape[1] :].tolist()
        seconds = (time.perf_counter() - start) / len(prompts)
        results = []
        for sample, prompt in enumerate(prompts):
            tokens = _until_end(written[sample][: most[sample]], _end_tokens(self.model))
            results.append(
                {
                    "answer": self.processor.decode(tokens, skip_special_tokens=True).strip(),
                    "tokens": len(tokens),
                    "prompt_tokens": prompt.tokens,
                    "visible": int(report.visible_tokens[sample]) if prompt.pictures else 0,
                    "kept": int(report.kept_tokens[sample]) if prompt.pictures else 0,
                    "seconds": round(seconds, 4),
                }
            )
        return results

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What `generate` gets of rows whose pictures it reads itself."""
        placed = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if "pixel_values" in placed:
            placed["pixel_values"] = placed["pixel_values"].to(self.model.dtype)
        return {**placed, "cache_implementation": "trimmed", "cache_config": self.config}

    def _encoded(self, pictures: Sequence[Sequence[Image.Image]], texts: Sequence[str]) -> dict[str, Any]:
        """What `generate` gets of rows whose pictures are encoded, now or earlier."""
        if self.encode is None:
            raise ValueError("There is nothing to encode pictures with.")
        encoded = [self.encode(own) for own in pictures]
        tiles, most = [own.tiles for own in encoded], encoded[0].most_tiles
        inputs = prompt_inputs(self.processor, tiles, texts, most, self.model.device)
        return {**inputs, CACHE: TrimmedCache(self.model, self.config, pictures=encoded)}


def _id(row: Any) -> dict[str, Any]:
    name = row.id if isinstance(row, Row) else row.get("id") if isinstance(row, Mapping) else None
    return {} if name is None else {"id": name}


def _likeness(prompt: Prompt) -> tuple[int, int, int]:
    """Rows that are near each other in this order make a batch with little padding."""
    return len(prompt.pictures), prompt.tiles, prompt.tokens


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else {ends}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token and with it.

    Example:
        >>> _until_end([5, 2, 0, 0], {2})
        [5, 2]
    """
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU PyTorch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
