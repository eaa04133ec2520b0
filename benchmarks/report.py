"""Tables and plots from the results' JSON: docs/benchmarks.md between its markers, and docs/assets/*.png."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import compiled_report
from benchmarks.common import SCENARIOS, read_result
from benchmarks.markdown import milliseconds, percent, table
from trim_plugin.report import format_bytes


def write(results: Path, docs: Path) -> list[Path]:
    """Make everything that the results at hand allow; returns the files written."""
    assets = docs / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "".join(f"{_marker(n)}\n" for n in SECTIONS)
    written = []
    for name, (make_tables, make_plots) in SECTIONS.items():
        result = read_result(name, results)
        if result is None:
            continue
        text = _replaced(text, name, make_tables(result) + "\n" + _footer(result))
        written += make_plots(result, assets)
    page.write_text(text, encoding="utf-8")
    return [page, *written]


def _marker(name: str) -> str:
    return f"<!-- begin {name} -->\n<!-- end {name} -->"


def _replaced(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    if not re.search(pattern, text, re.S):
        text += f"\n{_marker(name)}\n"
    return re.sub(pattern, lambda match: f"{match[1]}{content}{match[2]}", text, flags=re.S)


def _footer(result: dict[str, Any]) -> str:
    where = result["environment"]
    quick = " `--quick`: few cases, rough figures." if result["quick"] else ""
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    return (
        f"Measured {where['date']}: {where['cpu']}{gpu}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, bitsandbytes {where['bitsandbytes']}, peft {where['peft']}, seed {where['seed']}.{quick}\n"
    )


def points(row: dict[str, Any]) -> str:
    """The change to stock in percentage points, with its interval."""
    low, high = row["change_interval"]
    return f"{100 * row['change']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def memory_tables(result: dict[str, Any]) -> str:
    """Held bytes and peaks, the planner's errors, and what failed."""
    good = [row for row in result["rows"] if "error" not in row]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in good):
        own = [row for row in good if row["shape"] == shape]
        parts.append(f"### {shape}\n")
        parts.append(
            table(
                [
                    "scenario",
                    "batch",
                    "weights",
                    "LoRA",
                    "cache",
                    "weights held",
                    "adapters",
                    "cross KV",
                    "self KV",
                    "peak of generation",
                    "process peak",
                ],
                [
                    [
                        SCENARIOS[row["scenario"]].title,
                        str(row["batch"]),
                        row["weights"],
                        "yes" if row["lora"] else "no",
                        row["cache"],
                        format_bytes(sum(row["weights_by_part"].values())),
                        format_bytes(row["adapters"]),
                        format_bytes(row["cross_kv"]),
                        format_bytes(row["self_kv"]),
                        format_bytes(row["peak"] - row["before"]),
                        format_bytes(row["peak"]),
                    ]
                    for row in own
                ],
            )
        )
    planned = [row for row in good if "planned" in row]
    if planned:
        parts.append("### The planner against these measurements\n")
        parts.append(_planner_table(planned))
    failed = [row for row in result["rows"] if "error" in row]
    if failed:
        parts.append("Failed cases:\n")
        parts += [
            f"- {row['shape']}, {row['scenario']}, batch {row['batch']}, {row['weights']}, {row['cache']}: {row['error']}"
            for row in failed
        ]
        parts.append("")
    return "\n".join(parts)


def _planner_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for shape, weights in dict.fromkeys((row["shape"], row["weights"]) for row in rows):
        own = [row["planned"] for row in rows if (row["shape"], row["weights"]) == (shape, weights)]
        dynamic = [
            row for row in rows if (row["shape"], row["weights"]) == (shape, weights) and row["cache"] != "stock static"
        ]
        ratios = sorted(plan["generation"] / max(1, plan["generation_measured"]) for plan in own)
        lines.append(
            [
                f"{shape}, {weights}",
                str(len(own)),
                percent(max(abs(plan["weights_error"]) for plan in own), 2),
                f"{max(abs(plan['cross_kv_error']) for plan in own)} B",
                f"{max((abs(row['planned']['self_kv'] - row['self_kv']) for row in dynamic), default=0)} B",
                f"{ratios[0]:.2f} … {ratios[len(ratios) // 2]:.2f} … {ratios[-1]:.2f}",
            ]
        )
    header = [
        "shape, weights",
        "cases",
        "largest error of weights",
        "of cross KV",
        "of self KV",
        "peak of generation, planned / measured (lowest … median … highest)",
    ]
    return table(header, lines)


def memory_plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Cross KV by scenario and cache."""
    written = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        own = [
            row
            for row in result["rows"]
            if row["shape"] == shape
            and "error" not in row
            and row["batch"] == 1
            and not row["lora"]
            and row["weights"] in ("float32", "bfloat16")
        ]
        wanted = [name for name in dict.fromkeys(row["cache"] for row in own) if name != "stock static"]
        names = [name for name in SCENARIOS if any(row["scenario"] == name for row in own)]
        if not names:
            continue
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        width = 0.8 / len(wanted)
        for number, cache in enumerate(wanted):
            found = {row["scenario"]: row["cross_kv"] / 2**20 for row in own if row["cache"] == cache}
            places = [n + number * width - 0.4 + width / 2 for n, name in enumerate(names) if name in found]
            axes.bar(places, [found[name] for name in names if name in found], width, label=cache)
        axes.set_xticks(range(len(names)), names)
        axes.set_yscale("log")
        axes.set_ylabel("cross KV, MiB")
        axes.set_title(f"{shape}: cross-attention KV held while decoding, one sample", fontsize=10)
        axes.legend(fontsize=7, ncols=2)
        written.append(_save(figure, assets / f"memory-{shape}.png"))
    return written


def latency_tables(result: dict[str, Any]) -> str:
    """Decoding and prefill by shape, and what scoring costs."""
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        parts.append(f"### {shape} ({result['dtype'][shape]})\n")
        lines = []
        for case in result["rows"]:
            if case["shape"] != shape:
                continue
            for row in case["rows"]:
                ratio, interval = row["step_ratio"], "{:.3f} … {:.3f}".format(*row["step_ratio_interval"])
                prefill = row["prefill_ratio"]
                lines.append(
                    [
                        SCENARIOS[case["scenario"]].title,
                        str(case["batch"]),
                        row["way"],
                        milliseconds(row["step_seconds"]["median"]),
                        f"{row['tokens_per_second']:.3g}",
                        f"{ratio['median']:.3f} ({interval}; {ratio['low']:.3f} … {ratio['high']:.3f})",
                        f"{row['roofline_ratio']:.3f}",
                        f"{row['roofline_share']:.2f}",
                        milliseconds(row["prefill_seconds"]["median"]),
                        f"{prefill['median']:.3f}",
                    ]
                )
        header = [
            "scenario",
            "batch",
            "way",
            "step, ms",
            "tokens/s",
            "step / stock (95 % interval of the median; quartiles)",
            "roofline",
            "roofline reached",
            "prefill, ms",
            "prefill / stock",
        ]
        parts.append(table(header, lines))
    parts.append(_verdict(result))
    parts.append("### What scoring costs (one page, one sample)\n")
    parts.append(
        table(
            [
                "shape",
                "scoring, ms",
                "a self-attention layer, ms",
                "a cross-attention layer, ms",
                "share of 40 layers' prefill",
                "scratch",
            ],
            [
                [
                    row["shape"],
                    milliseconds(row["seconds"]["median"]),
                    milliseconds(row["layer_seconds"]["self"]),
                    milliseconds(row["layer_seconds"]["cross"]),
                    percent(row["share_of_40_layers"], 2) if "share_of_40_layers" in row else "–",
                    format_bytes(row["scratch_bytes"]),
                ]
                for row in result["scoring"]
            ],
        )
    )
    return "\n".join(parts)


def slower_than_stock(case: dict[str, Any], way: str = "exact") -> bool:
    """Whether a way's decoding step is slower than stock's beyond the noise, the interval of stock against itself."""
    intervals = {row["way"]: row["step_ratio_interval"] for row in case["rows"]}
    return way in intervals and intervals[way][0] > max(1.0, intervals["stock again"][1])


def _verdict(result: dict[str, Any]) -> str:
    cases = result["rows"]
    slower = [
        f"{case['shape']}, {case['scenario']}, batch {case['batch']}" for case in cases if slower_than_stock(case)
    ]
    exact = f"Exact mode decodes slower than stock beyond the noise in {len(slower)} of {len(cases)} cases"
    text = exact + (f": {'; '.join(slower)}.\n" if slower else ".\n")
    trimmed = [
        row["roofline_share"]
        for case in cases
        if case["shape"] != "small"
        for row in case["rows"]
        if row["way"].startswith("kept")
    ]
    if trimmed:
        reached = sum(share >= 0.9 for share in trimmed)
        text += (
            f"\nAt random shapes trimmed ways reach 0.9 of the roofline's ratio in {reached} of {len(trimmed)} cases.\n"
        )
    return text


def latency_plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Step time over stock's beside the roofline."""
    written = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        own = [case for case in result["rows"] if case["shape"] == shape]
        ways = ["stock again", "exact", "kept 0.5", "kept 0.25", "kept 0.1"]
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        width = 0.8 / len(ways)
        for number, way in enumerate(ways):
            places, heights, errors, roofs = [], [], [[], []], []
            for place, case in enumerate(own):
                row = next((row for row in case["rows"] if row["way"] == way), None)
                if row is None:
                    continue
                middle = row["step_ratio"]["median"]
                places.append(place + number * width - 0.4 + width / 2)
                heights.append(middle)
                errors[0].append(max(0.0, middle - row["step_ratio_interval"][0]))
                errors[1].append(max(0.0, row["step_ratio_interval"][1] - middle))
                roofs.append(row["roofline_ratio"])
            axes.bar(places, heights, width, yerr=errors, error_kw={"lw": 0.6}, label=way)
            axes.scatter(
                places, roofs, marker="_", color="black", s=25, zorder=3, label="roofline" if number == 0 else None
            )
        axes.axhline(1.0, color="grey", lw=0.6)
        axes.set_xticks(range(len(own)), [f"{case['scenario']}\n{case['batch']}" for case in own], fontsize=7)
        axes.set_ylabel("step time / stock's")
        axes.set_title(f"{shape}: a decoding step, by scenario and batch size", fontsize=10)
        axes.legend(fontsize=7, ncols=3)
        written.append(_save(figure, assets / f"latency-{shape}.png"))
    return written


def quality_tables(result: dict[str, Any]) -> str:
    """Accuracy of every rule, by type and tiles, and under quantization."""
    kinds = list(result["rows"][0]["by_type"])
    lines = []
    for row in result["rows"]:
        change = "–" if row["rule"] == "stock" else points(row)
        lines.append(
            [
                row["rule"],
                "–" if row["parameter"] is None else f"{row['parameter']:g}",
                percent(row["kept_share"]),
                percent(row["accuracy"]),
                change,
                percent(row["agreement"]),
                *(percent(row["by_type"][kind]["accuracy"]) for kind in kinds),
            ]
        )
    header = [
        "rule",
        "parameter",
        "kept of visible",
        "accuracy",
        "change to stock, points (95 % interval)",
        "same as stock",
        *kinds,
    ]
    parts = [
        f"{result['questions']} questions about {result['scenes']} held-out scenes.\n",
        "Smallest measured kept share down to which no setting of a rule lost more than 0.5 points:\n",
        table(
            ["rule", "kept of visible"],
            [
                [rule, "none" if share is None else percent(share)]
                for rule, share in result["loss_below_half_a_point"].items()
                if rule != "exact"
            ],
        ),
        "All settings:\n",
        table(header, lines),
        "The paper's rule by tiles of the picture:\n",
        _tiles_table(result),
    ]
    if result["conditions"]:
        parts.append("Under quantization and adapters (change: to the same model with stock's cache):\n")
        parts.append(
            table(
                [
                    "condition",
                    "ratio",
                    "kept of visible",
                    "cross KV of stock's",
                    "accuracy",
                    "change, points (95 % interval)",
                    "same as stock",
                ],
                [
                    [
                        row["condition"],
                        "stock" if row["ratio"] is None else f"{row['ratio']:g}",
                        percent(row["kept_share"]),
                        percent(row["cross_kv_ratio"]),
                        percent(row["accuracy"]),
                        points(row),
                        percent(row["agreement"]),
                    ]
                    for row in result["conditions"]
                ],
            )
        )
    return "\n".join(parts)


def _tiles_table(result: dict[str, Any]) -> str:
    counts = list(result["rows"][0]["by_tiles"])
    rows = [row for row in result["rows"] if row["rule"] in ("stock", "paper")]
    return table(
        ["ratio", *(f"{count} tile{'s' * (count != '1')}: kept, accuracy" for count in counts)],
        [
            [
                "stock" if row["parameter"] is None else f"{row['parameter']:g}",
                *(
                    f"{percent(part['kept_share'], 0)}, {percent(part['accuracy'])}"
                    for part in (row["by_tiles"][count] for count in counts)
                ),
            ]
            for row in rows
        ],
    )


def quality_plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Accuracy against kept share, all questions and lists alone."""
    stock = result["rows"][0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    families = [name for name in dict.fromkeys(row["rule"] for row in result["rows"]) if name not in ("stock", "exact")]
    for number, family in enumerate(families):
        rows = sorted((row for row in result["rows"] if row["rule"] == family), key=lambda row: row["kept_share"])
        shares = [row["kept_share"] for row in rows]
        style = {"marker": "os^vD<>Px*"[number % 10], "ms": 3, "lw": 1, "label": family}
        middle = [row["accuracy"] for row in rows]
        errors = [
            [max(0.0, row["accuracy"] - row["accuracy_interval"][0]) for row in rows],
            [max(0.0, row["accuracy_interval"][1] - row["accuracy"]) for row in rows],
        ]
        left.errorbar(shares, middle, yerr=errors if family.startswith("paper") else None, elinewidth=0.6, **style)
        right.plot(shares, [row["by_type"]["list"]["accuracy"] for row in rows], **style)
    left.axhline(stock["accuracy"], color="grey", lw=0.6)
    right.axhline(stock["by_type"]["list"]["accuracy"], color="grey", lw=0.6)
    left.set_title("all questions (95 % intervals on the paper's rule)", fontsize=10)
    right.set_title('"Read all digits." (long answers)', fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("kept share of visible tokens (measured)")
        axes.set_ylabel("accuracy")
    right.legend(fontsize=7)
    return [_save(figure, assets / "quality.png")]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


SECTIONS = {
    "quality": (quality_tables, quality_plots),
    "memory": (memory_tables, memory_plots),
    "latency": (latency_tables, latency_plots),
    "compiled": (compiled_report.tables, compiled_report.plots),
}
