"""Tables of `benchmarks.throughput.predicted`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import milliseconds, table
from benchmarks.throughput.predicted import SGLANG
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """By the GPU's memory, beside SGLang."""
    found = (
        f"Pages of {result['visual_tokens']:,} visual tokens, {result['prompt']} prompt tokens, {result['new']} new ones. "
        "**Predicted, not measured.**\n\n"
    )
    header = ["", "bytes of a request", "requests that fit", "over SGLang's", "ms a step", "tokens a second, decoding"]
    header += ["with reading the pages", "over SGLang's"]
    for memory in dict.fromkeys(row["memory_gib"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["memory_gib"] == memory]
        beside = next(row for row in own if row["way"] == SGLANG)
        lines = [
            [
                row["way"],
                format_bytes(row["request_bytes"]),
                str(row["fit"]),
                f"{row['fit'] / beside['fit']:.2f}",
                milliseconds(row["step_seconds"]),
                f"{row['decoding_tokens_a_second']:.0f}",
                f"{row['tokens_a_second']:.0f}",
                f"{row['tokens_a_second'] / beside['tokens_a_second']:.2f}",
            ]
            for row in own
        ]
        found += f"### {memory} GiB ({own[0]['device']}), {own[0]['weights']} weights\n\n" + table(header, lines) + "\n"
    return found
