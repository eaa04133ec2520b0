"""A report that a person looks at: one HTML file with pictures, questions, and the answers of all variants side by side."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
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
    groups: dict[str, list[str]] = {"different": [], "same": [], "unread": []}
    styles: list[str] = []
    for question in questions:
        own = [found[question.name, name] for name in names if (question.name, name) in found]
        if not own:
            continue
        unread = any(answer.error for answer in own)
        shown = () if unread else pictures(question)
        classes = [f"p{len(styles) + number}" for number in range(len(shown))]
        styles += [
            f".{name}{{background-image:url({_jpeg(picture.image)})}}"
            for name, picture in zip(classes, shown, strict=True)
        ]
        kind = "unread" if unread else "same" if _all_alike(own) else "different"
        groups[kind].append(_article(question, own, list(zip(classes, shown, strict=True)), match))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        pictures="\n".join(styles),
        summary=_summary(rows, remarks),
        overview=_overview(groups),
        questions="\n".join(article for articles in groups.values() for article in articles),
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
    together = " or ".join(str(number) for number in sorted(number for number in numbers if number is not None))
    said = []
    if together:
        said.append(
            f"* up to {together} questions at once: a share of the time of all, which is not to be compared with one that was "
            "alone. --max-running 1, with another --out, answers every question alone."
        )
    if None in numbers:
        said.append("Neither seconds nor memory where runs with different --max-running have shared the questions.")
    return " ".join(said)


def _summary(rows: Sequence[Summary], remarks: Sequence[str]) -> str:
    said = "".join(f"<p class=error>{_safe(remark)}</p>" for remark in remarks)
    return (_summary_table(rows) if rows else "") + said


def _summary_table(rows: Sequence[Summary]) -> str:
    shown = shown_headings(rows)
    head = "".join(f'<th title="{_safe(HEADINGS[name])}">{_safe(name)}</th>' for name in shown)
    texts = [cells(row) for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{_safe(own[name])}</td>' for name in shown)}</tr>" for own in texts)
    notes = "; ".join(f"<b>{_safe(name)}</b> {_safe(HEADINGS[name])}" for name in shown)
    said = f"{notes}. {_safe(note(rows))}".strip()
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p class=note>{said}</p>"


def _overview(groups: Mapping[str, Sequence[str]]) -> str:
    parts = [f"First the questions on which the answers differ: {len(groups['different'])}"]
    parts.append(f"then those with the same answer: {len(groups['same'])}")
    if groups["unread"]:
        parts.append(f"last those that could not be answered: {len(groups['unread'])}")
    return _safe("; ".join(parts) + ".")


def _article(question: Question, own: list[Answer], shown: list[tuple[str, Shown]], match: str) -> str:
    right = f"<p class=right>right: {_safe(' / '.join(question.answers))}</p>" if question.answers else ""
    files = ", ".join(picture.name for picture in question.pictures)
    cards = "".join(_card(question, answer, own[0], shown, match) for answer in own)
    return (
        f"<article><h2>{_safe(question.text)}</h2><p class=file>{_safe(question.name)} · {_safe(files)}</p>{right}"
        f"<div class=cards>{cards}</div></article>"
    )


def _card(question: Question, answer: Answer, first: Answer, shown: list[tuple[str, Shown]], match: str) -> str:
    if answer.error:
        return f"<section class=card><h3>{_safe(answer.way)}</h3><p class=error>{_safe(answer.error)}</p></section>"
    differs = " differs" if normalized(answer.text) != normalized(first.text) else ""
    mark = ""
    if question.answers:
        mark = "<b class=yes>✓</b> " if is_right(answer.text, question.answers, match) else "<b class=no>✗</b> "
    drawn = "".join(_drawn(name, picture, answer) for name, picture in shown)
    return (
        f"<section class='card{differs}'><h3>{_safe(answer.way)}</h3>{drawn}"
        f"<p class=answer>{mark}{_safe(answer.text) or '<i>nothing</i>'}</p>"
        f"<p class=figures>{_safe(_figures(answer))}</p></section>"
    )


def _figures(answer: Answer) -> str:
    time = f"{answer.new_tokens} tokens in {answer.seconds:.2f} s"
    if answer.at_once > 1:
        time += f" (a share: up to {answer.at_once} at once)"
    if not answer.visible_tokens:
        return time
    share = f"{100 * answer.kept_tokens / answer.visible_tokens:.0f} %"
    size = f"{format_bytes(answer.cross_kv_bytes)} of {format_bytes(answer.stock_cross_kv_bytes)}"
    return f"kept {answer.kept_tokens} of {answer.visible_tokens} visible tokens ({share}), {size}, {time}"


def _drawn(name: str, picture: Shown, answer: Answer) -> str:
    width, height = picture.image.size
    overlay, described = "", "the picture"
    if answer.kept:
        kept = picture.tile_map.patches(unpack_kept(answer.kept, picture.total))
        described = f"{int(kept.sum())} of {kept.size} patches kept"
        if not kept.all():
            overlay = f"<div class=dropped style='background-image:url({_png(dropped_overlay(kept))})'></div>"
    return (
        f"<div class='picture {name}' style='aspect-ratio:{width}/{height}' role=img aria-label='{described}' "
        f"title='{described}'>{overlay}</div>"
    )


def _all_alike(answers: Sequence[Answer]) -> bool:
    return len({normalized(answer.text) for answer in answers}) == 1


def _jpeg(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return _data_uri(small, "jpeg", quality=85)


def _png(pixels: np.ndarray) -> str:
    # Few colours: a palette makes it a tenth of the size.
    return _data_uri(Image.fromarray(pixels).quantize(4, method=Image.Quantize.FASTOCTREE), "png", optimize=True)


def _data_uri(image: Image.Image, kind: str, **settings: int | bool) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)
