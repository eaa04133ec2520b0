"""What many at once means for 11B on a GPU, **predicted, not measured**: ``python -m benchmarks throughput --predicted``.

Requests that fit: the bytes that an `Engine` takes for keys and values, divided by those of a request at its longest. Seconds are
those of `benchmarks.gpu.predicted`: a step reads the text model's weights and all keys and values that are held, and multiplies
with the weights once for every request; a prefill is counted there. Nothing overlaps, one page is read at a time.

SGLang's row is what its cache has to hold, in its favour: the real tiles' tokens in the cross-attention layers alone, no pages of
memory half full, the same bytes and prefill as here, and steps whose launches cost nothing, since it replays them as CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.common.cost import Counts, seconds
from benchmarks.common.results import RESULTS, read_result, write_result
from trim_plugin.engine.memory import OF_FREE_MEMORY
from trim_plugin.planning.configuration import ModelNumbers, built_in_config
from trim_plugin.planning.model_sizes import cross_kv_bytes, self_kv_bytes, weight_bytes

NAME = "throughput_predicted"
#: GiB, the GPU whose speed is taken, and the weights.
GPUS = ((24, "4090", "nf4"), (80, "H100", "bf16"))
PROMPT, NEW = 128, 128
#: Name of a way → share of the visual tokens that is kept, and the way of `benchmarks.gpu.predicted` whose prefill and launches
#: it has.
WAYS = {"exact": (1.0, "stock"), "kept 0.25": (0.25, "kept 0.25"), "kept 0.1": (0.1, "kept 0.1")}
SGLANG = "SGLang's cache"
READ_BY_A_STEP = ("self-attention layers", "cross-attention layers", "lm_head")


def step_weights(config: ModelNumbers, weights: str) -> tuple[float, float]:
    """Bytes that a step of several requests moves for the weights, and multiplications and additions of one request.

    4-bit weights are written out in 16 bits first, as bitsandbytes does where several rows are multiplied.

    Example:
        >>> whole, four_bit = (step_weights(built_in_config("11b"), weights)[0] for weights in ("bf16", "nf4"))
        >>> four_bit > whole
        True
    """
    held, whole = weight_bytes(config, weights), weight_bytes(config)
    moved = sum(held[part] + (2 * whole[part] if held[part] != whole[part] else 0) for part in READ_BY_A_STEP)
    return moved, float(sum(whole[part] for part in READ_BY_A_STEP))  # two bytes and two operations a weight


def predict(counted: dict[str, Any]) -> dict[str, Any]:
    """All rows.

    Args:
        counted: the result of `benchmarks.gpu.predicted`.
    """
    config, tokens = built_in_config("11b"), int(counted["visual_tokens"])
    found = {(row["part"], row["way"]): row for row in counted["rows"]}
    rows = []
    for gib, device, weights in GPUS:
        room = OF_FREE_MEMORY * (gib * 2**30 - sum(weight_bytes(config, weights).values()))
        moved, operations = step_weights(config, weights)
        for way, (share, counted_way) in {**WAYS, SGLANG: (1.0, "stock")}.items():
            kept = math.ceil(share * tokens)
            visual = cross_kv_bytes(config, 1, kept)
            longest = self_kv_bytes(config, 1, PROMPT + NEW - 1) + visual
            fit = int(room // longest)
            launches = 0 if way == SGLANG else found["step", counted_way]["launches"]
            held = fit * (self_kv_bytes(config, 1, PROMPT + NEW // 2) + visual)
            step = seconds(Counts(launches, moved + held, fit * operations), device)
            own = found["prefill", counted_way]
            more = moved - step_weights(config, "bf16")[0]
            prefill = seconds(Counts(own["launches"], own["bytes"] + more, own["operations"]), device)
            rows.append(
                {
                    "memory_gib": gib,
                    "device": device,
                    "weights": weights,
                    "way": way,
                    "request_bytes": longest,
                    "fit": fit,
                    "step_seconds": step,
                    "prefill_seconds": prefill,
                    "decoding_tokens_a_second": fit / step if fit else 0.0,
                    "tokens_a_second": fit * NEW / (fit * prefill + NEW * step) if fit else 0.0,
                }
            )
    return {"prompt": PROMPT, "new": NEW, "visual_tokens": tokens, "rows": rows}


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Predict, write and return the result; nothing if `benchmarks.gpu.predicted` has left none."""
    counted = read_result("predicted", RESULTS)
    if counted is None:
        return None
    result = predict(counted)
    write_result(NAME, result, Path(arguments.out))
    return result
