"""Do long answers drift from stock's, and would choosing anew help? ``python -m benchmarks quality --positions``.

Every rule is told stock's own answer, token after token, and says what it would have said next. So one token that differs does
not spoil those after it, and a fall from the first tokens to the last is the position's doing. Beside what was chosen once, at
the prompt, stands what is chosen anew for every token: the rule reads the prompt and the answer so far from the start. That is
what a predictor of attention could reach at best while the rule stays the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.common.decoding import Decoding
from benchmarks.common.intervals import bootstrap
from benchmarks.common.results import environment, write_result
from benchmarks.common.seeds import seed_everything
from benchmarks.quality.conditions import load_model
from benchmarks.quality.measure import SCENE_SETS, run_stock
from benchmarks.quality.questions import Batch, question_batches, scenes_from
from benchmarks.quality.rules import Rule
from benchmarks.small_model.tasks import Task, folder_of, model_name, result_name, task_of
from trim_plugin import KCenter, TrimConfig, TrimmedCache
from trim_plugin.embedded import SMALL_MODEL

#: The type of question that has the longest answers, by what the model was trained for.
LONGEST = {"digits": "list", "pages": "page"}
#: First position of each row of the table; the last one has the rest.
STARTS = (0, 8, 16, 24)
RULES = (
    Rule("paper, merged", 0.15, {"top_k_ratio": 0.15}),
    Rule("paper, merged", 0.05, {"top_k_ratio": 0.05}),
    Rule("paper, dropped", 0.15, {"top_k_ratio": 0.15, "merge": False}),
    Rule("k-center, merged", 0.35, {"processors": [KCenter(0.35)]}),
    Rule("k-center, merged", 0.25, {"processors": [KCenter(0.25)]}),
    Rule("k-center, merged", 0.1, {"processors": [KCenter(0.1)]}),
)
#: Rules that look at the text: choosing anew can change nothing for the others.
ASKING = tuple(rule for rule in RULES if rule.family.startswith("paper"))
#: For every sample, whether each token that was said is stock's.
Marks = list[list[bool]]


def said_next(model: Any, batch: Batch, rule: Rule, told: list[list[int]]) -> Marks:
    """Whether a rule's next token is stock's, at every position of stock's answers; what is kept is chosen once."""
    decoding = Decoding(model, batch.inputs, TrimmedCache(model, TrimConfig(**rule.settings)))
    with rule.context():
        found = [decoding.prefill()]
    for position in range(max(map(len, told)) - 1):
        decoding.token = torch.tensor([[row[min(position, len(row) - 1)]] for row in told])
        found.append(decoding.step())
    said = torch.cat(found, dim=1).tolist()
    return [[a == b for a, b in zip(row, own, strict=False)] for row, own in zip(said, told, strict=True)]


@torch.no_grad()
def said_next_anew(model: Any, batch: Batch, rule: Rule, told: list[list[int]]) -> Marks:
    """The same where prompt and answer so far are read anew for every token, so that all of it chooses."""
    marks: Marks = [[] for _ in told]
    for position in range(max(map(len, told))):
        samples = [number for number, row in enumerate(told) if len(row) > position]
        cache = TrimmedCache(model, TrimConfig(**rule.settings))
        with rule.context():
            output = model(**_grown(batch, samples, told, position), cache=cache, use_cache=True, logits_to_keep=1)
        for sample, token in zip(samples, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            marks[sample].append(token == told[sample][position])
    return marks


def _grown(batch: Batch, samples: list[int], told: list[list[int]], position: int) -> dict[str, torch.Tensor]:
    """Inputs of some samples with the first tokens of their answers behind the prompt."""
    count = len(batch.answers)
    states = batch.inputs["cross_attention_states"]
    own = {name: tensor[samples] for name, tensor in batch.inputs.items() if len(tensor) == count}
    own["cross_attention_states"] = states.view(count, -1, *states.shape[1:])[samples].flatten(0, 1)
    answers = torch.tensor([told[sample][:position] for sample in samples], dtype=torch.long).view(len(samples), -1)
    reads = own["cross_attention_mask"][:, -1:].expand(-1, position, *[-1] * (own["cross_attention_mask"].ndim - 2))
    mask = torch.cat([own["attention_mask"], torch.ones_like(answers)], dim=1)
    return own | {
        "input_ids": torch.cat([own["input_ids"], answers], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "cross_attention_mask": torch.cat([own["cross_attention_mask"], reads], dim=1),
    }


def shares(marks: Marks) -> list[dict[str, Any]]:
    """For each stretch of positions: how many tokens, and the share that is stock's, with its interval over answers."""
    found = []
    for start, end in zip(STARTS, (*STARTS[1:], None), strict=True):
        parts = [row[start:end] for row in marks if row[start:end]]
        if not parts:
            continue
        counts = np.array([(sum(part), len(part)) for part in parts])
        found.append(
            {
                "from": start,
                "tokens": int(counts[:, 1].sum()),
                "agreement": float(counts[:, 0].sum() / counts[:, 1].sum()),
                "agreement_interval": bootstrap(counts, lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum()),
            }
        )
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    count = 12 if arguments.quick else arguments.scenes
    folder = folder_of(arguments.model or SMALL_MODEL)
    task, model = task_of(folder), load_model(folder)
    kind = LONGEST[task.name]
    result: dict[str, Any] = {
        "environment": environment(),
        "quick": arguments.quick,
        "model": model_name(folder),
        "scenes": count,
        "kind": kind,
        "rows": [],
    }
    batches = _asked(model, task, kind, count)
    told = [stock.first for stock in run_stock(model, batches)]
    ends = [[[*row, model.generation_config.eos_token_id] for row in rows] for rows in told]
    for rule, choose, anew in track([*_ways()], "quality: positions"):
        marks = [mark for batch, rows in zip(batches, ends, strict=True) for mark in choose(model, batch, rule, rows)]
        for row in shares(marks):
            result["rows"].append({"rule": rule.family, "parameter": rule.parameter, "anew": anew} | row)
        write_result(result_name("positions", folder), result, arguments.out)
    return result


def _asked(model: Any, task: Task, kind: str, count: int) -> list[Batch]:
    seed = SCENE_SETS["fresh"]
    batches = question_batches(model, scenes_from(seed, count, model, task), seed, task=task)
    return [batch for batch in batches if batch.kind == kind]


def _ways() -> Iterator[tuple[Rule, Callable[..., Marks], bool]]:
    yield from ((rule, said_next, False) for rule in RULES)
    yield from ((rule, said_next_anew, True) for rule in ASKING)
