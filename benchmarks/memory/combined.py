"""What weights, adapter and cache take together, and how much then fits: ``python -m benchmarks memory --combined``.

Nothing is measured and no model runs: these are the planner's figures for the 11B model, a page of four tiles a sample, 128
tokens of prompt and 128 of answer. How far the planner is from measured peaks is told by `benchmarks.memory.measure` and
`benchmarks.memory.pieces`.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import torch

from benchmarks.common.models import transformers_config
from benchmarks.common.results import write_result
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.planning import planner
from trim_plugin.planning.configuration import built_in_config
from trim_plugin.planning.fitting import largest_fit
from trim_plugin.planning.job import Job

MEMORY = 24 * 2**30
WEIGHTS = ("bf16", "int8", "nf4")
BATCH = 16
RANK = 16
WAYS = (
    planner.PlannedVariant("stock"),
    planner.PlannedVariant("exact", 1.0, 1.0),
    planner.PlannedVariant("default", DEFAULT_KEPT_SHARE),
    planner.PlannedVariant("KCenter(0.1), nf4 KV", 0.1, kv_quantization="nf4"),
)


def adapter_bytes(rank: int = RANK) -> int:
    """Bytes of a LoRA adapter on the 11B text model's attention, as peft makes it; no weights are allocated."""
    from peft import get_peft_model
    from transformers import MllamaForConditionalGeneration

    from trim_plugin.integrations.peft import lora_config

    with torch.device("meta"):
        model = MllamaForConditionalGeneration._from_config(transformers_config("11b"), dtype=torch.bfloat16)
        adapted = get_peft_model(model, lora_config("text_attention", rank))
    return sum(tensor.nbytes for name, tensor in adapted.named_parameters() if "lora_" in name)


def rows(config: Any, adapter: int, adapted: bool) -> list[dict[str, Any]]:
    """Every kind of weights with every cache: the peak of a batch, and the largest batch."""
    found = []
    for weights in WEIGHTS:
        for way in WAYS:
            plan = planner.plan(config, Job(batch=BATCH), way, weights=weights)
            fit = largest_fit(config, Job(), way, MEMORY - adapter, weights=weights)
            found.append(
                {
                    "weights": weights,
                    "adapter": adapted,
                    "way": way.name,
                    "weights_bytes": plan.weights_total + adapter,
                    "cross_kv": plan.cross_kv,
                    "self_kv": plan.self_kv,
                    "peak": plan.peak + adapter,
                    "largest_batch": fit.largest_batch,
                    "limit": fit.limit,
                }
            )
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calculate, write and return the result; without peft there are no rows with an adapter."""
    config = built_in_config("11b")
    adapter = adapter_bytes() if importlib.util.find_spec("peft") is not None else None
    result = {
        "quick": False,
        "memory": MEMORY,
        "reserve": planner.RESERVE,
        "batch": BATCH,
        "adapter": adapter,
        "rows": rows(config, 0, False) + ([] if adapter is None else rows(config, adapter, True)),
    }
    write_result("combined", result, arguments.out)
    return result
