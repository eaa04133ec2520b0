"""How often the host reads from a device and copies to it, against stock: measured on the emulated accelerator.

`python -m tests.accelerator.budgets` writes the table on the architecture page; `test_budgets.py` fails where the page says
something else, and where a budget is exceeded:

- a decoding step reads no more often than stock's, and copies no more often;
- a prefill (`generate` up to the first token) reads at most 8 times more than stock and copies at most 4 times more,
  however many samples, visibility groups and pictures there are.

Two things come on top, and are told apart:

- a rule of which nobody knows beforehand how many tokens it keeps may read once more in every micro-batch after the
  first: it is trimmed before the next one is read, which is what micro-batches are for.
- an assisted round that has pictures may read once more for each of its two models: a forward of several rows looks at
  its mask of tiles, since new rows may read less than what is held. Stock's assisted decoding cannot have pictures.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from trim_plugin import KCenter, TopPPerHead, TrimmedCache, encode_pictures
from trim_plugin.compat import CACHE
from trim_plugin.embedded import ask, examples

from ..exactness.conversations import Conversation
from ..random_models import PAIR, Sample, random_model
from .emulation import Emulation, to_devices
from .ways import ALONE, MIXED, TEXT, Place, emulated_place

READS, COPIES = 8, 4
PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "call-flow.md"
START, END = "<!-- budgets -->\n", "<!-- /budgets -->"
STEPS = 3
#: Eight samples of one to four pictures, each picture a visibility group of its own.
MANY = [*MIXED, Sample((1, (1,), 2, (2,), 2, (3,), 2, (6,), 2)), *ALONE, Sample((1, (4,), 2, (5,), 2, (1,), 1)), *ALONE]
FIRST = [Sample((1, (6,), 4)), Sample((2, (1,), 3))]
NEW_PICTURE = [Sample((1, (2,), 2)), Sample((1, (6,), 2))]
ASKED = [Sample((6,))]
EXACT = {"top_k_ratio": 1.0}
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
        micro_batches: in how many the prompt is read, if the rule has to read in each.
        image_size: of the model; 144 has 1,297 visual tokens a tile.
        encoded: so many times a picture of the small trained model is asked about instead, encoded beforehand for ours.
        needs_bitsandbytes: whether it does.
        stock_samples: other prompts for stock's, where it cannot do this with pictures.
        step_reads: how many more reads than stock's a step may have.
    """

    samples: list[Sample]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    stock: dict[str, Any] = dataclasses.field(default_factory=dict)
    then: list[Sample] | None = None
    micro_batches: int = 1
    image_size: int = 8
    encoded: int = 0
    needs_bitsandbytes: bool = False
    stock_samples: list[Sample] | None = None
    step_reads: int = 0

    @property
    def assisted(self) -> bool:
        """Whether a smaller model proposes tokens; a step is a round then."""
        return "assistant_model" in self.settings


def _assistant(place: Place) -> Any:
    """A smaller model that proposes tokens."""
    return to_devices(random_model(1, layers=3, cross_layers=(1,)), place.device)


CASES = {
    "one picture": Case(ALONE),
    "two samples": Case(PAIR),
    "exact": Case(MIXED, {"top_k_ratio": 1.0}),
    "the paper's rule": Case(MANY, {"top_k_ratio": 0.15}),
    "dropped": Case(PAIR, {"top_k_ratio": 0.2, "merge": False}),
    "top-p": Case(MIXED, {"processors": [TopPPerHead(0.6)]}),
    "k-center, a share": Case(MANY, {"processors": [KCenter(0.3)]}),
    "k-center, a radius": Case(MANY, {"processors": [KCenter(radius=0.3)]}),
    "k-center, a small radius among 1,297 and 5,188 tokens": Case(
        PAIR, {"processors": [KCenter(radius=0.05)]}, image_size=144
    ),
    "8 samples, 18 groups": Case(MANY),
    "the same, exact": Case(MANY, {"top_k_ratio": 1.0}),
    "the same in 8 micro-batches": Case(MANY, {"prefill_pictures": 1}),
    "the same, exact, in 8 micro-batches": Case(MANY, {"prefill_pictures": 1, "top_k_ratio": 1.0}),
    "the paper's rule in 8 micro-batches": Case(MANY, {"prefill_pictures": 1, "top_k_ratio": 0.15}, micro_batches=8),
    "two samples, 1,297 and 5,188 tokens": Case(PAIR, image_size=144),
    "the same in 2 micro-batches": Case(PAIR, {"prefill_pictures": 1}, image_size=144),
    "8 samples, 1,297 and 5,188 tokens, in 8 micro-batches": Case([*PAIR] * 4, {"prefill_pictures": 1}, image_size=144),
    "int8 KV": Case(MIXED, {"kv_quantization": "int8"}, needs_bitsandbytes=True),
    "nf4 KV": Case(MIXED, {"kv_quantization": "nf4"}, needs_bitsandbytes=True),
    "sampling": Case(MIXED, settings={"do_sample": True}),
    "beams": Case(MIXED, settings={"num_beams": 3}),
    "beams in 4 micro-batches": Case(
        MIXED, {"prefill_pictures": 1}, settings={"num_beams": 3, "num_return_sequences": 2}
    ),
    "several returned": Case(MIXED, settings={"do_sample": True, "num_return_sequences": 3}),
    "static": Case(MIXED, {"static": True}, {"disable_compile": True}, STATIC),
    "static, beams": Case(PAIR, {"static": True}, {"disable_compile": True, "num_beams": 2}, STATIC),
    "tower on fewer patches": Case(MIXED, {"tower_share": 0.6}),
    "the same in 8 micro-batches, 11 pictures": Case(MANY, {"tower_share": 0.6, "prefill_pictures": 1}),
    "assisted, text": Case(ASKED, EXACT, settings={"assistant_model": _assistant}),
    "assisted, a picture; stock: text": Case(
        ALONE, EXACT, settings={"assistant_model": _assistant}, stock_samples=ASKED, step_reads=2
    ),
    "an encoded picture": Case([], encoded=1),
    "8 samples of encoded and merged pictures in 8 micro-batches": Case([], {"prefill_pictures": 1}, encoded=8),
    "text only": Case(TEXT),
    "second turn, text": Case(FIRST, then=[Sample((3,))] * 2),
    "second turn, a picture": Case(FIRST, then=NEW_PICTURE),
    "the same, 16 samples in 8 micro-batches": Case(FIRST * 8, {"prefill_pictures": 2}, then=NEW_PICTURE * 8),
    "second turn, exact": Case(FIRST, {"top_k_ratio": 1.0}, then=NEW_PICTURE),
}


@dataclasses.dataclass
class Counts:
    """Host reads and copies by line, of a prefill and of a decoding step; a step's are fractions where steps differ.

    `k_center` are the reads of the prefill that are `KCenter`'s own.
    """

    reads: collections.Counter[str]
    copies: collections.Counter[str]
    step_reads: float
    step_copies: float
    k_center: int = 0


@dataclasses.dataclass
class Measured:
    """A case, stock's and ours."""

    case: Case
    stock: Counts
    ours: Counts

    @property
    def problems(self) -> list[str]:
        """What is over budget, with the lines that it comes from."""
        stock, ours, found = self.stock, self.ours, []
        reads = READS + self.case.micro_batches - 1
        for kind, most in (("reads", reads), ("copies", COPIES)):
            more = getattr(ours, kind).total() - getattr(stock, kind).total()
            if more > most:
                lines = getattr(ours, kind) - getattr(stock, kind)
                found.append(f"a prefill has {more} more {kind} than stock, {most} are allowed: {dict(lines)}")
            step, their_step = getattr(ours, f"step_{kind}"), getattr(stock, f"step_{kind}")
            if step > their_step + (self.case.step_reads if kind == "reads" else 0):
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


@contextlib.contextmanager
def k_center_apart(device: Emulation) -> Iterator[list[int]]:
    """Within it every choice of `KCenter` adds to the list how often it has read."""
    chosen, reads = KCenter.choose, []

    def choose(*args: Any, **named: Any) -> torch.Tensor:
        before = device.reads.total()
        found = chosen(*args, **named)
        reads.append(device.reads.total() - before)
        return found

    KCenter.choose = choose
    try:
        yield reads
    finally:
        KCenter.choose = chosen


def measured(name: str, place: Place, device: Emulation) -> Measured:
    """Count a case; a first call of ours is not counted: it fills tables that are made once for a device."""
    case = CASES[name]
    torch.manual_seed(0)
    _counted(place, case, True, device, 1)
    found = []
    for trimmed in (False, True):
        torch.manual_seed(0)
        (prefill, *steps), k_center = _counted(place, case, trimmed, device, 1 + STEPS)
        steps = steps[1:] if case.assisted else steps  # the first round of several rows lays out what is held, once
        per_step = (sum(one[kind].total() for one in steps) / len(steps) for kind in (0, 1))
        found.append(Counts(*prefill, *per_step, k_center=k_center))
    return Measured(case, *found)


#: Reads and copies by line.
Lines = tuple[collections.Counter[str], collections.Counter[str]]


def _counted(place: Place, case: Case, trimmed: bool, device: Emulation, new: int) -> tuple[list[Lines], int]:
    """What was counted up to the first token and up to every other one; and the reads that are `KCenter`'s."""
    model, inputs, how = place.model, {}, {"do_sample": False, **case.settings, "max_new_tokens": new}
    how = {name: value(place) if isinstance(value, Callable) else value for name, value in how.items()}
    if case.then is not None:
        inputs, how[CACHE] = _second_turn(place, case, trimmed)
    elif case.encoded:
        model, inputs, cache = _encoded(place, case, trimmed)
        how |= {} if cache is None else {CACHE: cache}
    else:
        inputs = place.inputs(case.samples if trimmed else case.stock_samples or case.samples)
        how |= {"cache_implementation": "trimmed", "cache_config": case.config} if trimmed else case.stock
    steps = Steps(device)
    with k_center_apart(device) as k_center:
        device.clear()
        model.generate(**inputs, **how, stopping_criteria=[steps])
    return steps.counted, sum(k_center)


def _encoded(place: Place, case: Case, trimmed: bool) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """The small model, and questions about a picture: as stock takes them, or on the encoded picture, merged if they are many."""
    model, processor = place.small()
    if trimmed:
        rule = KCenter(0.5) if case.encoded > 1 else None
        pictures = encode_pictures(model, processor, [examples()[0].picture], rule=rule)
        inputs = pictures.inputs(processor, "Read all digits.")
    else:
        inputs = ask(processor)
    several = {name: tensor.repeat_interleave(case.encoded, dim=0) for name, tensor in inputs.items()}
    cache = TrimmedCache(model, case.config, pictures=[pictures] * case.encoded) if trimmed else None
    return model, place.put(several), cache


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
        return measured(name, _place(devices, CASES[name].image_size), device)


@functools.lru_cache(maxsize=4)
def _place(devices: int, image_size: int) -> Place:
    return emulated_place(devices, "sdpa", image_size=image_size)


def table() -> str:
    """The table of the page: what ours has on one device, and how much more that is than stock's."""
    lines = [
        "| | reads, prefill | of them `KCenter`'s | copies, prefill | reads, step | copies, step |",
        "|---|---|---|---|---|---|",
    ]
    for name in CASES:
        ours, stock = measured_on(name, 1).ours, measured_on(name, 1).stock
        pairs = [
            (ours.reads.total(), stock.reads.total()),
            (ours.copies.total(), stock.copies.total()),
            (ours.step_reads, stock.step_reads),
            (ours.step_copies, stock.step_copies),
        ]
        reads, *others = (f"{own:.3g} ({own - their:+.2g})".replace("+0)", "=)") for own, their in pairs)
        lines.append(" | ".join([f"| {name}", reads, str(ours.k_center or "–"), *others]) + " |")
    return "\n".join(lines) + "\n"


def shown() -> str:
    """The table that the page holds now."""
    return PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]


def write() -> None:
    """Let the page hold today's table."""
    text = PAGE.read_text(encoding="utf-8")
    new = re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: START + table() + END, text, flags=re.DOTALL)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
