"""`trim-plugin demo`: questions about real pictures, stock beside trimmed, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from trim_plugin.arithmetic import format_bytes
from trim_plugin.commands import UserError, common, loading, plain_console, user_errors
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.embedded import examples
from trim_plugin.variants import Variant, variants_for

if TYPE_CHECKING:
    from PIL import Image

    from trim_plugin.asking.answers import Inputs
    from trim_plugin.cache.report import TrimReport

#: The package's default first: its kept tokens are drawn.
DEFAULT_SHARES = (DEFAULT_KEPT_SHARE, 0.1)
(EXACT,) = variants_for([1.0], stock=False)
#: Generations of which the time is the median.
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Question:
    """Pictures, what is asked about them, and the true answer if it is known."""

    pictures: Sequence[Image.Image]
    text: str
    truth: str | None = None


@dataclasses.dataclass(frozen=True)
class Timed:
    """An answer, the median of its seconds, and the report of its cache (None for stock)."""

    text: str
    seconds: float
    report: TrimReport | None


#: The answers of every variant, by its heading in the table; one for each question.
Answers = dict[str, list[Timed]]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    shares = " and ".join(map(str, DEFAULT_SHARES))
    parser = common.add_command(subparsers, "demo", run, [common.generation_options(shares=shares, several=True)])
    common.add_image_option(parser, "pictures, all read by one question (default: the held-out ones of the package)")
    parser.add_argument("--prompt", help="a question about the pictures (default: those of the held-out pictures)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("trim-demo.png"),
        metavar="FILE",
        help="where the picture of kept tokens goes: .png, .svg, .pdf or .jpg (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer, print the table and three sentences, write the picture."""
    console = plain_console()
    chosen = _with_exact(common.checked_rules(arguments, shares=DEFAULT_SHARES, stock=True))
    common.check_folder_of(arguments.out)
    if arguments.out.suffix.lower() not in {".png", ".svg", ".pdf", ".jpg"}:
        raise UserError(f"--out must end in .png, .svg, .pdf or .jpg, got {arguments.out.name}")
    questions = _questions(arguments)
    loading.begin_loading(arguments)
    model, processor = loading.load_model(arguments)
    answers: Answers = {_heading(variant): [] for variant in chosen}
    for question in questions:
        inputs = _inputs(processor, question)
        with console.status(Text(f"answering {question.text}")):
            for variant in chosen:
                answer = _answer(model, processor, inputs, variant, arguments.max_new_tokens)
                answers[_heading(variant)].append(answer)
    again = _asked_again(model, processor, questions[0])
    drawn = _save_picture(arguments.out, model, processor, questions[0], answers, chosen)
    console.print(_table(questions, answers))
    for sentence in (_of_answers(questions, answers), _of_time(answers, again), drawn):
        console.print(sentence)


def _heading(variant: Variant) -> str:
    named = variant.name.replace("k-center", "share")
    return f"ratio {named}" if named[0].isdigit() else named


def _with_exact(chosen: list[Variant]) -> list[Variant]:
    """Stock, exact mode, then the rules: the second shows what costs nothing."""
    return chosen if EXACT.name in [variant.name for variant in chosen] else [chosen[0], EXACT, *chosen[1:]]


def _questions(arguments: argparse.Namespace) -> list[Question]:
    known = [
        Question(common.pictures_of([str(example.picture)]), example.question, example.answer) for example in examples()
    ]
    if not arguments.image and arguments.prompt is None:
        return known
    if not arguments.image:
        return [Question(known[0].pictures, arguments.prompt)]
    return [Question(common.pictures_of(arguments.image), arguments.prompt or known[0].text)]


def _inputs(processor: Any, question: Question) -> Inputs:
    from trim_plugin.asking.answers import Inputs
    from trim_plugin.pictures.prompting import written

    return Inputs.of(processor, [written(processor, question.text, len(question.pictures))], [question.pictures])


def _answer(model: Any, processor: Any, inputs: Inputs, variant: Variant, new_tokens: int) -> Timed:
    from trim_plugin.asking.answers import answer

    seconds = []
    for _ in range(REPEATS):
        (own,), cache = answer(model, processor, inputs, variant.config, new_tokens)
        seconds.append(own.seconds)
    return Timed(own.text.strip(), statistics.median(seconds), None if variant.stock else cache.report())


def _asked_again(model: Any, processor: Any, question: Question) -> tuple[float, float]:
    """Seconds to the first token of a second question: with the vision tower, and on what it yielded for the first."""
    from trim_plugin.asking.answers import Inputs
    from trim_plugin.pictures.encoding import encode_pictures

    encoded = encode_pictures(model, processor, question.pictures)
    tower = _answer(model, processor, _inputs(processor, question), EXACT, 1)
    known = _answer(model, processor, Inputs.about(processor, [question.text], [encoded]), EXACT, 1)
    return tower.seconds, known.seconds


def _table(questions: list[Question], answers: Answers) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    truths = any(question.truth is not None for question in questions)
    for heading in ["question", *(["true"] if truths else []), *answers]:
        table.add_column(heading)
    for number, question in enumerate(questions):
        stock, *others = (own[number].text or "–" for own in answers.values())
        row = [question.text, *([question.truth or "?"] if truths else []), stock]
        row += ["same" if text == stock else text for text in others]
        table.add_row(*row, end_section=number == len(questions) - 1)
    space = [""] if truths else []
    tokens, held = _held(answers)
    table.add_row("visual tokens held, mean", *space, *(f"{own / len(questions):.0f}" for own in tokens))
    table.add_row("their KV, of all", *space, *map(format_bytes, held))
    table.add_row("of stock's", *space, *(_percent(own, held[0]) for own in held))
    return table


def _held(answers: Answers) -> tuple[list[int], list[int]]:
    """Visual tokens that each variant holds, and their bytes, over all questions; stock's are known from the others' reports."""
    reports = [[one.report for one in own if one.report is not None] for own in answers.values()]
    known = next(own for own in reports if own)
    tokens = [sum(sum(one.kept_tokens) for one in own) for own in reports]
    held = [sum(one.cross_kv_bytes for one in own) for own in reports]
    tokens[0] = sum(sum(one.total_tokens) for one in known)
    held[0] = sum(one.stock_cross_kv_bytes for one in known)
    return tokens, held


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _of_answers(questions: list[Question], answers: Answers) -> str:
    """Whose answers are stock's, and how many bytes that takes."""
    _, held = _held(answers)
    stock, *others = answers.values()
    parts = []
    for name, own, size in zip(list(answers)[1:], others, held[1:], strict=True):
        same = sum(one.text == other.text for one, other in zip(own, stock, strict=True))
        parts.append(f"{name} gives {same} with {_percent(size, held[0])}")
    count = "answer" if len(questions) == 1 else f"{len(questions)} answers"
    return f"Of stock's {count}, {', '.join(parts)} of the memory that stock holds of the pictures."


def _of_time(answers: Answers, again: tuple[float, float]) -> str:
    """What is gained in time, and where: a small model on a CPU gains none by trimming."""
    stock, *_, ours = (1000 * statistics.mean(one.seconds for one in own) for own in answers.values())
    tower, known = (1000 * own for own in again)
    return (
        f"An answer takes {stock:.0f} ms with stock and {ours:.0f} ms with {list(answers)[-1]}, vision tower "
        "included, which on a small model says little; a second question about a picture takes "
        f"{known:.0f} ms instead of {tower:.0f} ms to its first token if the picture was encoded once (trim-plugin encode)."
    )


def _save_picture(
    path: Path, model: Any, processor: Any, question: Question, answers: Answers, chosen: list[Variant]
) -> str:
    """Draw what the first rule that chooses keeps of the first question's last picture; says what was drawn."""
    shown = next((variant for variant in chosen if variant.config and not variant.config.keeps_reachable), None)
    if shown is None:
        return "No picture of kept tokens was drawn: these variants choose nothing."
    from trim_plugin.pictures.visualize import visualize

    inputs = _inputs(processor, question).arguments(model, None)
    title = f"{question.text} {answers[_heading(shown)][0].text}\nkept by {_heading(shown)}"
    with user_errors(OSError, before=f"cannot write {path}: "):
        visualize(model, inputs, shown.config, title=title).savefig(path, dpi=120)
    return f"What {_heading(shown)} keeps of the picture of the first question is drawn in {path}."
