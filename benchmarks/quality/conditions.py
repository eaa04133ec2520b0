"""The model in other number formats, the cache in others, and with an adapter."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.rules import Rule
from trim_plugin import KCenter

#: Parameters of the rules that are measured under every condition.
RATIOS, SHARES = (0.25, 0.15, 0.1), (0.35, 0.25, 0.1)


@dataclasses.dataclass(frozen=True)
class Condition:
    """A format of the weights, perhaps not of the vision tower's, perhaps the adapter, and further `TrimConfig` fields.

    It is measured on half of the fresh scenes, or `everywhere`: on all scenes of all sets.
    """

    name: str
    weights: str = "fp32"
    adapted: bool = False
    tower_whole: bool = False
    everywhere: bool = False
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rules(self) -> list[Rule]:
        """What is measured under it."""
        found = [Rule("paper, dropped", ratio, {"top_k_ratio": ratio, "merge": False}) for ratio in RATIOS[2:]]
        found += [Rule("paper, merged", ratio, {"top_k_ratio": ratio}) for ratio in RATIOS]
        found += [Rule("k-center, merged", share, {"processors": [KCenter(share)]}) for share in SHARES]
        return [dataclasses.replace(rule, settings=rule.settings | self.fields) for rule in found]


def conditions(adapter: Path | None) -> list[Condition]:
    """What this installation can run, and a LoRA adapter if there is one."""
    found = [Condition("bf16 weights", "bf16")]
    if adapter is not None:
        found.append(Condition("LoRA adapter", adapted=True, everywhere=True))
    if importlib.util.find_spec("bitsandbytes") is not None:
        found += [
            Condition("int8 KV", fields={"kv_quantization": "int8"}),
            Condition("nf4 KV", fields={"kv_quantization": "nf4"}),
            Condition("nf4 weights", "nf4"),
            Condition("nf4 weights, tower fp32", "nf4", tower_whole=True),
            Condition("int8 weights", "int8"),
            Condition("nf4 weights, nf4 KV", "nf4", fields={"kv_quantization": "nf4"}),
        ]
    return found


def load_model(folder: Path, weights: str = "fp32", adapter: Path | None = None, tower_whole: bool = False) -> Any:
    """A trained small model in a format, perhaps with an adapter; `tower_whole` leaves the vision tower in float32."""
    from trim_plugin.integrations.accelerate import load

    model, _ = load(
        folder, weights, adapter=adapter, device_map=None, dtype=torch.float32, quantize_vision=not tower_whole
    )
    return model.base_model.model if adapter is not None else model
