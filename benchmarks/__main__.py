"""``python -m benchmarks all|memory|latency|quality|encoded|tower|throughput|gpu|report [--quick]``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import report
from benchmarks.common.models import SHAPES
from benchmarks.common.results import RESULTS
from benchmarks.gpu import measure as gpu
from benchmarks.latency import compiled, first_token, merging, reading, tower
from benchmarks.latency import measure as latency
from benchmarks.latency import pieces as latency_pieces
from benchmarks.memory import combined
from benchmarks.memory import measure as memory
from benchmarks.memory import pieces as memory_pieces
from benchmarks.quality import encoded
from benchmarks.quality import measure as quality
from benchmarks.quality import tower as tower_quality
from benchmarks.throughput import measure as throughput

BENCHMARKS = {
    "latency": latency,
    "memory": memory,
    "quality": quality,
    "encoded": encoded,
    "tower": tower_quality,
    "throughput": throughput,
}

#: What `all` runs besides.
FURTHER = (compiled, first_token, merging, combined, memory_pieces, latency_pieces, tower, reading)


def _named(what: str) -> tuple[ModuleType, ...]:
    return (BENCHMARKS[what],) if what in BENCHMARKS else ()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Memory, speed and quality of trimmed generation."
    )
    parser.add_argument(
        "what", choices=["all", *BENCHMARKS, "gpu", "report"], help="`report` only makes tables and plots from JSON"
    )
    parser.add_argument("--quick", action="store_true", help="few cases, under 10 minutes in all")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, dest="shapes", help="models (default: small, 11b-layers)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[], help="batch sizes instead of the benchmark's own")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON files (default: benchmarks/results; with --quick, .../quick)"
    )
    parser.add_argument(
        "--docs", type=Path, help="folder of the pages, their tables/ and assets/ (default: docs; with --quick, --out)"
    )
    parser.add_argument("--threads", type=int, default=2)
    for benchmark in (*BENCHMARKS.values(), gpu):
        benchmark.add_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or ["small", "11b-layers"]
    arguments.out = arguments.out or (RESULTS / "quick" if arguments.quick else RESULTS)
    arguments.docs = arguments.docs or (arguments.out if arguments.quick else RESULTS.parents[1] / "docs")
    torch.set_num_threads(arguments.threads)
    if arguments.what == "gpu":
        gpu.run(arguments)
        return
    for benchmark in (*BENCHMARKS.values(), *FURTHER) if arguments.what == "all" else _named(arguments.what):
        start = time.perf_counter()
        benchmark.run(arguments)
        print(f"{benchmark.__name__.removeprefix('benchmarks.')}: {time.perf_counter() - start:.0f} s", flush=True)
    report.write(arguments.out, arguments.docs)


if __name__ == "__main__":
    main()
