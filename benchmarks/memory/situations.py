"""When trimming helps on one card of 24 GB: the planner's figures for what people do, as the first page shows them.

Nothing is measured and no model runs. The job is `trim-plugin plan 11b --weights nf4 --memory 24GiB`, with `--images` and
`--tiles` where a prompt holds many pictures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from benchmarks.common.tables import table
from benchmarks.memory.combined import MEMORY
from trim_plugin.planning import planner
from trim_plugin.planning.configuration import built_in_config
from trim_plugin.planning.fitting import largest_fit
from trim_plugin.planning.job import Job

WEIGHTS = "nf4"
#: Nobody puts more pictures into one prompt.
MOST = 2**14


@dataclasses.dataclass(frozen=True)
class Situation:
    """What somebody does.

    Args:
        name: as the table says it.
        job: what is generated.
        most: what there should be most of: "images" in one prompt, "batch" of samples, or nothing; then the memory is told.
    """

    name: str
    job: Job
    most: str | None = None


SITUATIONS = (
    Situation("one picture, one question: GiB", Job()),
    Situation("pictures in one prompt", Job(), "images"),
    Situation("one-tile video frames in one prompt", Job(tiles=1), "images"),
    Situation("users at once", Job(), "batch"),
)


@functools.cache
def most_images(job: Job, variant: planner.PlannedVariant, memory: int = MEMORY) -> int:
    """The most pictures of one prompt that fit; 0 if not even one does.

    Example:
        >>> stock, exact, *_ = planner.variants()
        >>> most_images(Job(tiles=1), stock) < most_images(Job(tiles=1), exact)
        True
    """
    config = built_in_config("11b")

    def fits(images: int) -> bool:
        planned = planner.plan(config, dataclasses.replace(job, images=images), variant, weights=WEIGHTS)
        return planned.needed <= memory

    low, high = 0, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def predicted(situation: Situation, variant: planner.PlannedVariant) -> float:
    """GiB that are needed, or how many fit."""
    config = built_in_config("11b")
    if situation.most == "images":
        return most_images(situation.job, variant)
    if situation.most == "batch":
        return largest_fit(config, situation.job, variant, MEMORY, weights=WEIGHTS).largest_batch
    return planner.plan(config, situation.job, variant, weights=WEIGHTS).needed / 2**30


def helps(results: dict[str, dict[str, Any]]) -> str:
    """The first page's table: what fits, stock beside exact mode and the default, and how much less a known picture takes."""
    variants = planner.variants()
    lines = []
    for situation in SITUATIONS:
        figures = [predicted(situation, variant) for variant in variants]
        shown: Callable[[float], str] = "{:.1f}".format if situation.most is None else "{:.0f}".format
        lines.append([situation.name, *map(shown, figures)])
    counted = results["first_token"]["arithmetic_11b"][1]
    share = f"{1 / counted['times_less']['encoded whole']:.0%}"
    lines.append(["same picture again: work before the answer", "100%", share, share])
    return table(["", "stock", "exact", "default"], lines)
