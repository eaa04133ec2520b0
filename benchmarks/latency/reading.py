"""What a decoding step pays for reading kept tokens: ``python -m benchmarks latency --reading``.

The attention of one cross-attention layer at the 11B model's widths, float32. Three ways take turns in one process: "ours" reads
each width class once; "padded" holds the same kept tokens padded to the fullest sample and repeats them for copies, as earlier
versions did; "stock" is transformers' attention over what transformers' own cache holds: every visual token, for every copy.
"ours again" is the noise. Bytes are those of the tensors that a step touches.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import types
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common.device import synchronize
from benchmarks.common.intervals import spread
from benchmarks.common.results import environment, write_result
from benchmarks.common.seeds import seed_everything
from trim_plugin.cache.kept import KeptTokens
from trim_plugin.cache.layers import CrossAttentionLayer
from trim_plugin.cache.reading import Lent, NamingOurs, attention
from trim_plugin.cache.regrouping import regrouped
from trim_plugin.selection.select import Columns

#: Steps of every case.
STEPS = 20
HEADS, KV_HEADS, HEAD_DIM, TOKENS, TILE = 32, 8, 128, 6404, 1601


@dataclasses.dataclass(frozen=True)
class Case:
    """Kept tokens of every source, and how often each is read."""

    kept: tuple[int, ...]
    copies: int = 1


CASES = {
    "4 pages, a tenth kept": Case((641,) * 4),
    "4 beams of a page, a quarter kept": Case((1601,), 4),
    "8 beams of a page, a quarter kept": Case((1601,), 8),
    "16 sequences of a page, a tenth kept": Case((641,), 16),
    "4 pages × 4 sequences, a tenth kept": Case((641,) * 4, 4),
    "exact: seven of 1 tile, one of 4": Case((1601,) * 7 + (6404,)),
    "seven pages that keep 40 to 60 %": Case((2600, 2800, 3000, 3200, 3400, 3600, 3800)),
}


def filled(case: Case) -> tuple[CrossAttentionLayer, torch.Tensor]:
    """A layer that holds the case, and the kept tokens padded to the fullest, as (sources, heads, tokens, head_dim)."""
    sources, widest = len(case.kept), max(case.kept)
    keys = torch.randn(sources, KV_HEADS, widest, HEAD_DIM)
    here = torch.arange(widest).expand(sources, -1)
    readable = here < torch.tensor(case.kept)[:, None]
    ones = torch.ones_like(here)
    columns = Columns(here, ones.bool(), ones, 0 * ones, readable, 0, TILE)
    record, picked = KeptTokens.of(
        columns,
        list(case.kept),
        visible=torch.full((sources,), widest),
        readable_tiles=torch.ones(sources, -(-widest // TILE), dtype=torch.bool),
        token_bytes=2 * KV_HEADS * HEAD_DIM * 4,
        dtype=torch.float32,
        sized=False,
        bucket=0,
    )
    layer = CrossAttentionLayer()
    layer.update(keys, keys.clone())
    layer.settle(record, picked)
    if case.copies > 1:
        order = [source for source in range(sources) for _ in range(case.copies)]
        record, recipe = regrouped([record], [(0, source) for source in range(sources)], order, 0)
        layer.regroup(record, recipe, [layer])
    return layer, keys


def measure(case: Case, steps: int, device: str) -> dict[str, Any]:
    """Milliseconds and bytes of a step, all ways in turns."""
    layer, padded = filled(case)
    batch = len(case.kept) * case.copies
    module = types.SimpleNamespace(
        num_key_value_groups=HEADS // KV_HEADS,
        training=False,
        config=NamingOurs(types.SimpleNamespace(_attn_implementation="sdpa")),
    )
    query = torch.randn(batch, HEADS, 1, HEAD_DIM)
    order = torch.arange(len(case.kept)).repeat_interleave(case.copies)
    closed = torch.arange(padded.shape[2]) >= torch.tensor(case.kept)[:, None]
    mask = torch.zeros(closed.shape).masked_fill_(closed, torch.finfo(torch.float32).min)[order][:, None, None]
    values = padded.clone()
    everything = torch.randn(len(case.kept), KV_HEADS, TOKENS, HEAD_DIM)[order]
    open_mask = torch.zeros(batch, 1, 1, TOKENS)

    def gathered() -> Any:
        own = (padded, values) if case.copies == 1 else (padded[order], values[order])
        return sdpa_attention_forward(module, query, *own, mask, scaling=HEAD_DIM**-0.5)

    ways = {
        "ours": lambda: attention(
            module, query, Lent(layer, "keys"), Lent(layer, "values"), None, scaling=HEAD_DIM**-0.5
        ),
        "padded": gathered,
        "stock": lambda: sdpa_attention_forward(
            module, query, everything, everything, open_mask, scaling=HEAD_DIM**-0.5
        ),
    }
    ways["ours again"] = ways["ours"]
    torch.testing.assert_close(ways["ours"]()[0], ways["padded"]()[0], rtol=1e-4, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 2):
        for name in ways if step % 2 == 0 else list(reversed(ways)):
            synchronize(device)
            start = time.perf_counter()
            ways[name]()
            synchronize(device)
            if step >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    ours = torch.tensor(times["ours"])
    held = sum(tensor.nbytes for tensor in layer.held_tensors())
    token = 2 * KV_HEADS * HEAD_DIM * 4
    return {
        "ms": {name: spread(values) for name, values in times.items()},
        "over": {name: spread((ours / torch.tensor(times[name])).tolist()) for name in ways if name != "ours"},
        "bytes": {"ours": held, "kept": sum(case.kept) * token, "stock": batch * TOKENS * token},
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every case."""
    seed_everything()
    with torch.no_grad():
        rows = [
            {"case": name, **measure(case, 3 if arguments.quick else STEPS, arguments.device)}
            for name, case in CASES.items()
        ]
    result = {"environment": environment(arguments.device), "quick": arguments.quick, "rows": rows}
    write_result("reading", result, arguments.out)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--reading", action="store_true", help="latency: how decoding reads kept tokens instead")
