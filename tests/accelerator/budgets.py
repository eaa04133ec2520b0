"""How often the host reads from a device and copies to it, against stock: measured on the emulated accelerator.

`python -m tests.accelerator.budgets` writes the table on the architecture page; `test_budgets.py` fails where the page says
something else, and where a budget is exceeded:

- a decoding step reads no more often than stock's, and copies no more often;
- a prefill (`generate` up to the first token) reads at most 8 times more than stock and copies at most 4 times more,
  however many samples, visibility groups, pictures and micro-batches there are.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from trim_plugin import KCenter, TopPPerHead, TrimmedCache
from trim_plugin.compat import CACHE

from ..exactness.conversations import Conversation
from ..random_models import PAIR, Sample
from .emulation import Emulation
from .ways import ALONE, MIXED, TEXT, Place, emulated_place

READS, COPIES = 8, 4
PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "call-flow.md"
START, END = "<!-- budgets -->\n", "<!-- /budgets -->"
STEPS = 3
#: Eight samples of one to four pictures, each picture a visibility group of its own.
MANY = [*MIXED, Sample((1, (1,), 2, (2,), 2, (3,), 2, (6,), 2)), *ALONE, Sample((1, (4,), 2, (5,), 2, (1,), 1)), *ALONE]
FIRST = [Sample((1, (6,), 4)), Sample((2, (1,), 3))]
NEW_PICTURE = [Sample((1, (2,), 2)), Sample((1, (6,), 2))]
STATIC = {"cache_implementation": "static"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        samples: the prompts.
        config: of the trimmed cache.
        settings: of `generate`, stock's and ours.
        stock: what stock's `generate` is given besides.
        then: the second turn of a conversation, which is what counts then.
    """

    samples: list[Sample]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    stock: dict[str, Any] = dataclasses.field(default_factory=dict)
    then: list[Sample] | None = None


CASES = {
    "one picture": Case(ALONE),
    "two samples": Case(PAIR),
    "exact": Case(MIXED, {"top_k_ratio": 1.0}),
    "dropped": Case(PAIR, {"top_k_ratio": 0.2, "merge": False}),
    "top-p": Case(MIXED, {"processors": [TopPPerHead(0.6)]}),
    "k-center, a share": Case(MANY, {"processors": [KCenter(0.3)]}),
    "k-center, a radius": Case(MANY, {"processors": [KCenter(radius=0.3)]}),
    "8 samples, 18 groups": Case(MANY),
    "the same, exact": Case(MANY, {"top_k_ratio": 1.0}),
    "the same in micro-batches": Case(MANY, {"prefill_pictures": 1}),
    "the same, exact, in micro-batches": Case(MANY, {"prefill_pictures": 1, "top_k_ratio": 1.0}),
    "int8 KV": Case(MIXED, {"kv_quantization": "int8"}),
    "nf4 KV, micro-batches": Case(MANY, {"kv_quantization": "nf4", "prefill_pictures": 1}),
    "sampling": Case(MIXED, settings={"do_sample": True}),
    "beams": Case(MIXED, settings={"num_beams": 3}),
    "beams in micro-batches": Case(MANY, {"prefill_pictures": 1}, settings={"num_beams": 3, "num_return_sequences": 2}),
    "several returned": Case(MIXED, settings={"do_sample": True, "num_return_sequences": 3}),
    "static": Case(MIXED, {"static": True}, {"disable_compile": True}, STATIC),
    "static, beams": Case(PAIR, {"static": True}, {"disable_compile": True, "num_beams": 2}, STATIC),
    "tower on fewer patches": Case(MIXED, {"tower_share": 0.6}),
    "text only": Case(TEXT),
    "second turn, text": Case(FIRST, then=[Sample((3,))] * 2),
    "second turn, a picture": Case(FIRST, then=NEW_PICTURE),
    "second turn, exact": Case(FIRST, {"top_k_ratio": 1.0}, then=NEW_PICTURE),
}


@dataclasses.dataclass
class Counts:
    """Host reads and copies by line, of a prefill and of a decoding step; a step's are fractions where steps differ."""

    reads: collections.Counter[str]
    copies: collections.Counter[str]
    step_reads: float
    step_copies: float


@dataclasses.dataclass
class Measured:
    """A case, stock's and ours."""

    stock: Counts
    ours: Counts

    @property
    def problems(self) -> list[str]:
        """What is over budget, with the lines that it comes from."""
        stock, ours, found = self.stock, self.ours, []
        for kind, most in (("reads", READS), ("copies", COPIES)):
            more = getattr(ours, kind).total() - getattr(stock, kind).total()
            if more > most:
                lines = getattr(ours, kind) - getattr(stock, kind)
                found.append(f"a prefill has {more} more {kind} than stock, {most} are allowed: {dict(lines)}")
            step, their_step = getattr(ours, f"step_{kind}"), getattr(stock, f"step_{kind}")
            if step > their_step:
                found.append(f"a step has {step:g} {kind}, stock's {their_step:g}")
        return found


class Steps:
    """A stopping criterion that stops nothing: at every step it takes down what was counted since the one before."""

    def __init__(self, device: Emulation) -> None:
        self.device = device
        self.counted: list[tuple[collections.Counter[str], collections.Counter[str]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.counted.append((self.device.reads, self.device.copies))
        self.device.clear()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measured(name: str, place: Place, device: Emulation) -> Measured:
    """Count a case; a first call of ours is not counted: it fills tables that are made once for a device."""
    case = CASES[name]
    torch.manual_seed(0)
    _generate(place, case, True, device, 1)
    found = []
    for trimmed in (False, True):
        torch.manual_seed(0)
        (reads, copies), *steps = _generate(place, case, trimmed, device, 1 + STEPS)
        found.append(Counts(reads, copies, *(sum(one[kind].total() for one in steps) / len(steps) for kind in (0, 1))))
    return Measured(*found)


def _generate(
    place: Place, case: Case, trimmed: bool, device: Emulation, new: int
) -> list[tuple[collections.Counter[str], collections.Counter[str]]]:
    """What was counted up to the first token, and up to every other one."""
    how: dict[str, Any] = {"do_sample": False, **case.settings, "max_new_tokens": new}
    if case.then is not None:
        inputs, cache = _second_turn(place, case, trimmed)
        how[CACHE] = cache
    else:
        inputs = place.inputs(case.samples)
        how |= {"cache_implementation": "trimmed", "cache_config": case.config} if trimmed else case.stock
    steps = Steps(device)
    device.clear()
    place.model.generate(**inputs, **how, stopping_criteria=[steps])
    return steps.counted


def _second_turn(place: Place, case: Case, trimmed: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """The inputs of a conversation's second turn, and the cache that holds its first."""
    talk = Conversation(place.model, len(case.samples)).say(*case.samples)
    cache = TrimmedCache(place.model, case.config) if trimmed else DynamicCache(config=place.model.config.text_config)
    output = place.model.generate(**place.put(talk.inputs()), **{CACHE: cache}, do_sample=False, max_new_tokens=2)
    talk.hear(output.inner)
    earlier = talk.pixels.shape[1]
    return place.put(talk.say(*case.then).inputs(earlier)), cache


@functools.lru_cache(maxsize=64)
def measured_on(name: str, devices: int) -> Measured:
    """The same with a model on one device or on two."""
    with Emulation() as device:
        return measured(name, _place(devices), device)


@functools.lru_cache(maxsize=2)
def _place(devices: int) -> Place:
    return emulated_place(devices, "sdpa")


def table(devices: tuple[int, ...] = (1, 2)) -> str:
    """The table of the page: ours over what stock has, for one device and for two."""
    lines = [
        "| | " + " | ".join(f"{of}, {_many(number)}" for number in devices for of in ("prefill", "step")) + " |",
        "|---|" + "---|" * 2 * len(devices),
    ]
    for name in CASES:
        cells = []
        for number in devices:
            one = measured_on(name, number)
            reads, copies = one.ours.reads.total(), one.ours.copies.total()
            cells.append(
                f"{reads} ({reads - one.stock.reads.total():+d}); {copies} ({copies - one.stock.copies.total():+d})"
            )
            step, their = one.ours, one.stock
            cells.append(
                f"{step.step_reads:.3g} ({step.step_reads - their.step_reads:+.2g}); "
                f"{step.step_copies:.3g} ({step.step_copies - their.step_copies:+.2g})"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _many(devices: int) -> str:
    return "one device" if devices == 1 else "two devices"


def shown() -> str:
    """The table that the page holds now."""
    return PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]


def write() -> None:
    """Let the page hold today's table."""
    text = PAGE.read_text(encoding="utf-8")
    new = re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: START + table() + END, text, flags=re.DOTALL)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    write()
