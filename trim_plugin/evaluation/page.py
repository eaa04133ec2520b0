"""A report that a person looks at: one HTML file with pictures, questions, and the answers of all variants side by side."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from trim_plugin.cache.report import format_bytes
from trim_plugin.evaluation.log import Answer, unpack_kept
from trim_plugin.evaluation.questions import Question
from trim_plugin.evaluation.summary import Summary, is_right, normalized
from trim_plugin.pictures.visualize import TileMap, dropped_overlay

#: Pixels of a picture's longer side in the report.
SIDE = 640
TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
HEADINGS = {
    "cache": "stock is transformers' own; a number is a top_k_ratio",
    "n": "questions answered by all",
    "right": "of the questions whose right answer is given",
    "agree": "answers that are the first variant's",
    "overlap": "words shared with the first variant's answers",
    "kept": "of the visible visual tokens",
    "KV": "bytes of the visual cache, of stock's",
    "s": "seconds a question",
    "GPU": "most memory allocated",
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture as the model sees it.

    Args:
        image: RGB, padded to whole tiles.
        tile_map: where its visual tokens lie.
        total: visual tokens of all pictures of the question.
    """

    image: Image.Image
    tile_map: TileMap
    total: int


def report_html(
    questions: Sequence[Question],
    rows: Sequence[Summary],
    answers: Sequence[Answer],
    pictures: Callable[[Question], Sequence[Shown]],
    match: str = "exact",
    remarks: Sequence[str] = (),
) -> str:
    """The whole file: needs nothing beside it, no network and no script.

    Questions on which the variants differ come first, those that could not be answered last.

    Args:
        questions: as read.
        rows: of `summarize`; the first variant is what the others are compared with.
        answers: of the log.
        pictures: gives the pictures of a question that was answered; asked once for each, so that few are held at a time.
        match: as in `summarize`.
        remarks: what else there is to say of the summary, as `lacks` does.
    """
    found = {(answer.question, answer.way): answer for answer in answers}
    # If nothing was answered, there is no row, and every question's error is shown all the same.
    names = [row.way for row in rows] or list(dict.fromkeys(answer.way for answer in answers))
    groups: dict[str, list[Any]] = {"different": [], "same": [], "unread": []}
    numbers = itertools.count()
    for question in questions:
        own = [found[question.name, name] for name in names if (question.name, name) in found]
        if not own:
            continue
        kind, shown = "unread", []
        if not any(answer.error for answer in own):
            kind = "same" if len({normalized(answer.text) for answer in own}) == 1 else "different"
            shown = [_small(f"p{next(numbers)}", picture) for picture in pictures(question)]
        groups[kind].append((question, own, shown))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        groups=groups,
        articles=list(itertools.chain.from_iterable(groups.values())),
        rows=[cells(row) for row in rows],
        headings={name: HEADINGS[name] for name in shown_headings(rows)},
        note=note(rows),
        remarks=remarks,
        is_right=lambda answer, question: is_right(answer.text, question.answers, match),
        normalized=normalized,
        figures=_figures,
        drawn=_drawn,
    )


def cells(row: Summary) -> dict[str, str]:
    """A summary row as text, a cell for each of `HEADINGS`."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    star = "" if row.at_once == 1 else "*"
    texts = (
        row.way,
        str(row.questions),
        "–" if row.accuracy is None else f"{percent(row.accuracy)} of {row.known}",
        percent(row.agreement),
        percent(row.overlap),
        percent(row.kept_share),
        percent(row.cross_kv_ratio),
        "–" if row.seconds is None else f"{row.seconds:.2f}{star}",
        "–" if row.peak_bytes is None else f"{format_bytes(row.peak_bytes)}{star}",
    )
    return dict(zip(HEADINGS, texts, strict=True))


def shown_headings(rows: Sequence[Summary]) -> list[str]:
    """Those of `HEADINGS` that say anything: the last is a GPU's."""
    return list(HEADINGS)[: len(HEADINGS) - all(row.peak_bytes is None for row in rows)]


def note(rows: Sequence[Summary]) -> str:
    """What has to be said about these rows' times and memory; empty if every question was alone.

    Example:
        >>> from trim_plugin.evaluation import summarize, variants_for
        >>> given = [Answer("1", "stock", "two", 0.5, 2), Answer("1", "exact", "two", 0.1, 2, at_once=32)]
        >>> note(summarize([Question("1", (), "?")], variants_for([1.0]), given))
        '* up to 32 questions at once: a share of the time of all, which is not to be compared with one that was alone. ...'
    """
    numbers = {row.at_once for row in rows} - {1}
    together = " or ".join(map(str, sorted(filter(None, numbers))))
    said = []
    if together:
        said.append(
            f"* up to {together} questions at once: a share of the time of all, which is not to be compared with one that was "
            "alone. --max-running 1, with another --out, answers every question alone."
        )
    if None in numbers:
        said.append("Neither seconds nor memory where runs with different --max-running have shared the questions.")
    return " ".join(said)


def _figures(answer: Answer) -> str:
    time = f"{answer.new_tokens} tokens in {answer.seconds:.2f} s"
    if answer.at_once > 1:
        time += f" (a share: up to {answer.at_once} at once)"
    if not answer.visible_tokens:
        return time
    share = f"{100 * answer.kept_tokens / answer.visible_tokens:.0f} %"
    size = f"{format_bytes(answer.cross_kv_bytes)} of {format_bytes(answer.stock_cross_kv_bytes)}"
    return f"kept {answer.kept_tokens} of {answer.visible_tokens} visible tokens ({share}), {size}, {time}"


def _small(name: str, picture: Shown) -> dict[str, Any]:
    """What the template needs of a picture, which is large itself."""
    small = picture.image.copy()
    small.thumbnail((SIDE, SIDE))
    address = _data_uri(small, "jpeg", quality=85)
    ratio = f"{picture.image.width}/{picture.image.height}"
    return {"name": name, "address": address, "ratio": ratio, "tile_map": picture.tile_map, "total": picture.total}


def _drawn(answer: Answer, tile_map: TileMap, total: int) -> tuple[str, str]:
    """What is said of a picture beside an answer, and the address of what is laid over it, if anything is."""
    if not answer.kept:
        return "the picture", ""
    kept = tile_map.patches(unpack_kept(answer.kept, total))
    described = f"{int(kept.sum())} of {kept.size} patches kept"
    if kept.all():
        return described, ""
    # Few colours: a palette makes it a tenth of the size.
    overlay = Image.fromarray(dropped_overlay(kept)).quantize(4, method=Image.Quantize.FASTOCTREE)
    return described, _data_uri(overlay, "png", optimize=True)


def _data_uri(image: Image.Image, kind: str, **settings: int | bool) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
