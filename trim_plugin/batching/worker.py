"""The worker behind every way of answering many rows: the command line, Ray, a server's batches, a loop of one's own."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trim_plugin.asking.answers import Inputs, answer, tried
from trim_plugin.asking.prompts import Prompt, decoded, read_prompt
from trim_plugin.asking.rows import Row, RowError
from trim_plugin.batching.sizing import pictures_at_a_time
from trim_plugin.config import TrimConfig
from trim_plugin.pictures.encoded import Pictures

#: A row's place among those that the worker was called with, and its prompt.
Placed = tuple[int, Prompt]


@dataclasses.dataclass(frozen=True)
class Read:
    """A batch whose pictures are decoded: either what `generate` is given, or pictures that are to be encoded first.

    Args:
        batch: the rows that could be read.
        failed: what is wrong with the others.
        inputs: on the CPU; None if there is something to encode, or nothing at all.
        pictures: of every row, where they are to be encoded.
    """

    batch: list[Placed]
    failed: dict[int, str]
    inputs: Inputs | None = None
    pictures: Sequence[list[Image.Image]] = ()


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
                read = following.result()
                # The next batch's pictures are decoded while this one is answered.
                following = self._read_next(reader, waiting)
                yield [(place, {**_id(rows[place]), **result}) for place, result in self._answered(read)]
                del read

    def _read_next(self, reader: ThreadPoolExecutor, waiting: deque[Placed]) -> Future[Read] | None:
        """Take the next batch of what is waiting, and begin to read it."""
        if not waiting:
            return None
        batch = [waiting.popleft()]
        pictures = len(batch[0][1].pictures)
        most = max(1, self.batch_size // max(1, pictures))
        while waiting and len(batch) < most and len(waiting[0][1].pictures) == pictures:
            batch.append(waiting.popleft())
        return reader.submit(self._read, batch)

    def _read(self, batch: Sequence[Placed]) -> Read:
        whole, pictures, failed = [], [], {}
        for place, prompt in batch:
            try:
                pictures.append([decoded(source) for source in prompt.pictures])
                whole.append((place, prompt))
            except RowError as error:
                failed[place] = str(error)
        if not whole or (self.encode is not None and pictures[0]):
            return Read(whole, failed, pictures=pictures)
        return Read(whole, failed, Inputs.of(self.processor, [prompt.text for _, prompt in whole], pictures))

    def _answered(self, read: Read) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, error in read.failed.items():
            yield place, {"error": error}
        batch = read.batch
        if not batch:
            return
        results, error, full = tried(functools.partial(self._generate, read))
        if results is not None:
            yield from zip((place for place, _ in batch), results, strict=True)
            return
        del read
        if full:
            _free_memory()
        if len(batch) == 1:
            yield batch[0][0], {"error": error}
            return
        middle = len(batch) // 2
        if full:
            self.batch_size = max(1, middle * len(batch[0][1].pictures))
        for half in (batch[:middle], batch[middle:]):
            yield from self._answered(self._read(half))

    def _generate(self, read: Read) -> list[dict[str, Any]]:
        prompts, inputs = [prompt for _, prompt in read.batch], read.inputs
        if inputs is None:
            if self.encode is None:
                raise ValueError("There is nothing to encode pictures with.")
            encoded = [self.encode(own) for own in read.pictures]
            inputs = Inputs.about(self.processor, [prompt.text for prompt in prompts], encoded)
        most = [prompt.max_new_tokens or self.max_new_tokens for prompt in prompts]
        answers, _ = answer(self.model, self.processor, inputs, self.config, most)
        return [own.result() for own in answers]


def _id(row: Any) -> dict[str, Any]:
    name = row.id if isinstance(row, Row) else row.get("id") if isinstance(row, Mapping) else None
    return {} if name is None else {"id": name}


def _likeness(prompt: Prompt) -> tuple[int, int, int]:
    """Rows that are near each other in this order make a batch with little padding."""
    return len(prompt.pictures), prompt.tiles, prompt.tokens


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
