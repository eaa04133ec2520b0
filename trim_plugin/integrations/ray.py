"""Many rows over a cluster: Ray Data with a pool of actors, each of which answers its rows by an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from transformers import GenerationConfig

from trim_plugin.asking.rows import Row
from trim_plugin.batching.worker import Worker
from trim_plugin.config import TrimConfig
from trim_plugin.engine.engine import MAX_RUNNING, running_config
from trim_plugin.engine.ignored import warn_of_ignored
from trim_plugin.integrations.accelerate import load

#: Columns that a worker reads; "id" and others stay as they are.
COLUMNS = ("images", "question", "messages", "max_new_tokens")
#: What a worker's result adds to a row. Every row has all of them, None where they don't apply, as columns have to.
RESULT = ("answer", "error", "tokens", "prompt_tokens", "visible", "kept", "seconds")
#: Rows that an actor gets at a time: enough for those that run to be always many, few enough to lose little with an actor.
ROWS = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What every actor makes its worker of.

    Args:
        model: a folder or hub id, the same on every machine.
        weights: as for `integrations.accelerate.load`.
        adapter: a LoRA adapter's folder.
        device: a device, or "auto": the actor's GPU, the CPU where it has none.
        config: of the trimmed cache.
        max_running: rows that an actor answers at once.
        memory: bytes that their keys and values may take; None takes what the actor's device has free.
        max_new_tokens: longest answer.
        folder: what relative names of pictures start from; every machine has to see it.

    Raises:
        ValueError: the configuration has a value that is not allowed, or that an engine cannot have.
    """

    model: str
    weights: str = "bf16"
    adapter: str | Path | None = None
    device: str = "auto"
    config: TrimConfig | Mapping[str, Any] | None = None
    max_running: int = MAX_RUNNING
    memory: int | None = None
    max_new_tokens: int = 128
    folder: str | Path = "."

    def __post_init__(self) -> None:
        running_config(self.config)  # said here, and not by every actor once it has loaded the model

    def load(self) -> tuple[Any, Any]:
        """The model, on its device, and its processor."""
        device = self.device
        if device in ("auto", "balanced", "sequential"):
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = "cpu" if found is None else str(found)
        return load(self.model, self.weights, adapter=self.adapter, device_map={"": device})

    def worker(self) -> Worker:
        """Load the model and make a worker of it."""
        model, processor = self.load()
        return Worker(
            model,
            processor,
            self.config,
            max_running=self.max_running,
            memory=self.memory,
            max_new_tokens=self.max_new_tokens,
            folder=self.folder,
        )


class Answerer:
    """An actor of the pool: called with columns of rows, it returns them with columns of results."""

    def __init__(self, recipe: Recipe) -> None:
        self.worker = recipe.worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns in, the same columns and those of `RESULT` out."""
        count = len(next(iter(batch.values())))
        rows = [{name: _plain(batch[name][place]) for name in COLUMNS if name in batch} for place in range(count)]
        results = self.worker([{name: value for name, value in row.items() if value is not None} for row in rows])
        return {**batch, **{name: [result.get(name) for result in results] for name in RESULT}}


class JsonAnswerer(Answerer):
    """An actor that gets a file's rows as JSON texts, since their fields may differ from row to row."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A column "row" in, a column "result" out."""
        results = self.worker([Row(**json.loads(row)) for row in batch["row"]])
        return {"result": [json.dumps(result) for result in results]}


def answer(
    dataset: ray.data.Dataset,
    model: str,
    *,
    actors: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    rows: int = ROWS,
    **settings: Any,
) -> ray.data.Dataset:
    """Answer a dataset's rows: a step of a pipeline of one's own, from and to whatever Ray Data reads and writes.

    Args:
        dataset: with columns "images" (a list of files or of files' bytes; may be left out) and "question" or "messages".
            Other columns stay as they are.
        model: a folder or hub id.
        actors: workers, each with a model of its own; one for every GPU of the cluster by default, or 1.
        num_cpus: CPUs that an actor takes.
        num_gpus: GPUs that an actor takes; 1 where the cluster has any, unless the device is the CPU.
        rows: rows that an actor gets at a time.
        settings: `Recipe`'s: `weights`, `adapter`, `device`, `config`, `max_running`, `memory`, `max_new_tokens`,
            `folder`.

    Returns:
        The dataset with the columns `RESULT`. What an actor that dies has in hand goes to another.

    Example:
        >>> import ray  # doctest: +SKIP
        >>> rows = ray.data.read_parquet("questions.parquet")  # doctest: +SKIP
        >>> answers = answer(rows, "meta-llama/Llama-3.2-11B-Vision-Instruct", config={"top_k_ratio": 0.1})  # doctest: +SKIP
        >>> answers.write_parquet("answers")  # doctest: +SKIP
    """
    return _mapped(dataset, Answerer, Recipe(model, **settings), actors, num_cpus, num_gpus, rows)


def answer_rows(
    rows: Sequence[Row], model: str, *, actors: int | None = None, num_cpus: float | None = None, **settings: Any
) -> Iterator[list[dict[str, Any]]]:
    """What `trim-plugin batch --engine ray` answers rows by: results some at a time, as they come; arguments as for `answer`."""
    recipe = Recipe(model, **settings)
    # Small pieces: every result is on disk as soon as its piece is done.
    gpus = _gpus()
    size = max(1, min(ROWS, -(-len(rows) // (4 * (actors or gpus or 1)))))
    dataset = ray.data.from_items(
        [{"row": json.dumps(dataclasses.asdict(row))} for row in rows], override_num_blocks=-(-len(rows) // size)
    )
    answered = _mapped(dataset, JsonAnswerer, recipe, actors, num_cpus, None, size)
    for batch in answered.iter_batches(batch_size=None, batch_format="numpy"):
        yield [json.loads(result) for result in batch["result"]]


def _mapped(
    dataset: ray.data.Dataset,
    answerer: type[Answerer],
    recipe: Recipe,
    actors: int | None,
    num_cpus: float | None,
    num_gpus: float | None,
    rows: int,
) -> ray.data.Dataset:
    with contextlib.suppress(OSError):  # the model has none, or lies where only actors see it: then their logs say it
        warn_of_ignored(GenerationConfig.from_pretrained(recipe.model))
    if num_gpus is None:
        num_gpus = 1 if recipe.device != "cpu" and _gpus() else 0
    return dataset.map_batches(
        answerer,
        fn_constructor_kwargs={"recipe": recipe},
        compute=ray.data.ActorPoolStrategy(size=actors or (_gpus() if num_gpus else 0) or 1),
        batch_size=rows,
        batch_format="numpy",
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )


def _gpus() -> int:
    """Of the cluster that this process belongs to, or begins."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return int(ray.cluster_resources().get("GPU", 0))


def _plain(value: Any) -> Any:
    """A cell as a row of Python's own types: columns hold arrays for lists, numpy's numbers, and NaN for what is missing."""
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value
