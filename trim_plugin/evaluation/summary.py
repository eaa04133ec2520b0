"""Accuracy, agreement with the first variant, kept share and time, over all questions."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from trim_plugin.evaluation.log import Answer
from trim_plugin.evaluation.questions import Question
from trim_plugin.variants import Variant

MATCHES = ("exact", "contains")


@dataclasses.dataclass(frozen=True)
class Summary:
    """One variant over all questions; means, and None for what cannot be known.

    Args:
        way: its name.
        questions: answered questions.
        known: those of them whose right answer is given.
        accuracy: share of right answers among these.
        agreement: share of answers that are the same as the first variant's, case, spaces and final punctuation aside.
        overlap: mean F1 of the words shared with the first variant's answer, which suits long answers.
        kept_share: kept visual tokens over visible ones.
        cross_kv_ratio: bytes of cached visual keys and values over stock's.
        seconds: per question. Compare those that were answered as many at once.
        peak_bytes: most memory on the GPU, over all questions; likewise.
        at_once: how many questions were answered at once, at most. None if some were answered in other company than others, by
            runs that went on with another number: then there are no seconds and no peak.
    """

    way: str
    questions: int
    known: int
    accuracy: float | None
    agreement: float
    overlap: float
    kept_share: float | None
    cross_kv_ratio: float | None
    seconds: float | None
    peak_bytes: int | None
    at_once: int | None = 1


def summarize(
    questions: Sequence[Question], variants: Sequence[Variant], answers: Sequence[Answer], match: str = "exact"
) -> list[Summary]:
    """Sum up every variant over the questions that all variants have answered; agreement is with the first variant.

    Questions whose picture could not be read count for none. A variant that has answered nothing at all (`silent`) has no row,
    and takes no question from the others.

    Args:
        questions: as read.
        variants: as run.
        answers: from the log.
        match: "exact": an answer is right if it equals a given one; "contains": if a given one occurs in it as whole words.
            Both leave case, spaces and final punctuation aside.

    Raises:
        ValueError: another `match`.

    Example:
        >>> from trim_plugin.evaluation import variants_for
        >>> question = Question("1", (), "Which digit is red?", ("seven",))
        >>> given = [Answer("1", "stock", "Seven.", 0.1, 2), Answer("1", "0.25", "nine", 0.1, 2, 65, 13, 20, 80)]
        >>> for row in summarize([question], variants_for([0.25]), given):
        ...     print(row.way, row.accuracy, row.agreement, row.kept_share)
        stock 1.0 1.0 None
        0.25 0.0 0.0 0.2
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {', '.join(map(repr, MATCHES))}, got {match!r}.")
    found = {(answer.question, answer.way): answer for answer in answers if not answer.error}
    mute = silent(variants, answers)
    variants = [variant for variant in variants if variant.name not in mute]
    whole = [question for question in questions if all((question.name, variant.name) in found for variant in variants)]
    if not whole or not variants:
        return []
    first = [found[question.name, variants[0].name] for question in whole]
    return [
        _summary(variant, whole, [found[question.name, variant.name] for question in whole], first, match)
        for variant in variants
    ]


def silent(variants: Sequence[Variant], answers: Sequence[Answer]) -> dict[str, str]:
    """The variants that have answered no question at all, by name, and the first error of each; empty if it has none either.

    Example:
        >>> given = [Answer("1", "stock", "seven", 0.1, 2), Answer("1", "0.5", "", 0.0, 0, error="no room")]
        >>> silent([Variant("stock", None), Variant("0.5", {})], given)
        {'0.5': 'no room'}
    """
    speaking = {answer.way for answer in answers if not answer.error}
    errors: dict[str, str] = {}
    for answer in answers:
        errors.setdefault(answer.way, answer.error)
    return {variant.name: errors.get(variant.name, "") for variant in variants if variant.name not in speaking}


def lacks(questions: Sequence[Question], variants: Sequence[Variant], answers: Sequence[Answer]) -> list[str]:
    """What a summary of these variants cannot show, a sentence each; empty if every variant has its row.

    Example:
        >>> given = [Answer("1", "stock", "seven", 0.1, 2), Answer("1", "0.5", "", 0.0, 0, error="no room")]
        >>> lacks([Question("1", (), "?")], [Variant("stock", None), Variant("0.5", {})], given)
        ['0.5 has answered none of 1 questions. The first error: no room']
    """
    mute = silent(variants, answers)
    said = [f"{name} has answered none of {len(questions)} questions. The first error: {mute[name]}" for name in mute]
    others = [variant for variant in variants if variant.name not in mute]
    if others and not summarize(questions, others, answers):
        names = ", ".join(variant.name for variant in others)
        said.insert(0, f"No question was answered with all of {names}, so there is nothing to compare.")
    return said


def whole_variants(
    questions: Sequence[Question], variants: Sequence[Variant], answers: Sequence[Answer]
) -> list[Variant]:
    """The variants that have dealt with every question: those of this run, and of earlier ones in the same folder.

    Stock is the first if it is there; a variant of an earlier run that was left unfinished is not among them.

    Example:
        >>> given = [Answer("1", variant, "seven", 0.1, 2) for variant in ("0.5", "stock")]
        >>> [variant.name for variant in whole_variants([Question("1", (), "?")], [Variant("0.25", None)], given)]
        ['stock', '0.5']
    """
    by_name: dict[str, set[str]] = {}
    for answer in answers:
        by_name.setdefault(answer.way, set()).add(answer.question)
    asked = {question.name for question in questions}
    known = {variant.name: variant for variant in variants}
    names = [name for name in by_name if name not in known] + list(known)
    names.sort(key=lambda name: name != "stock")
    return [known.get(name, Variant(name, None)) for name in names if asked <= by_name.get(name, set())]


def _summary(
    variant: Variant, questions: list[Question], answers: list[Answer], first: list[Answer], match: str
) -> Summary:
    known = [(q, a) for q, a in zip(questions, answers, strict=True) if q.answers]
    pairs = [(a.text, b.text) for a, b in zip(answers, first, strict=True)]
    numbers = {a.at_once for a in answers}
    visible, stock = sum(a.visible_tokens for a in answers), sum(a.stock_cross_kv_bytes for a in answers)
    return Summary(
        way=variant.name,
        questions=len(answers),
        known=len(known),
        accuracy=fmean(is_right(a.text, q.answers, match) for q, a in known) if known else None,
        agreement=fmean(normalized(text) == normalized(other) for text, other in pairs),
        overlap=fmean(word_overlap(text, other) for text, other in pairs),
        kept_share=sum(a.kept_tokens for a in answers) / visible if visible else None,
        cross_kv_ratio=sum(a.cross_kv_bytes for a in answers) / stock if stock else None,
        seconds=fmean(a.seconds for a in answers) if len(numbers) == 1 else None,
        peak_bytes=(max(a.peak_bytes for a in answers) or None) if len(numbers) == 1 else None,
        at_once=numbers.pop() if len(numbers) == 1 else None,
    )


def normalized(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end.

    Example:
        >>> normalized(" Red  seven, blue two. ")
        'red seven, blue two'
    """
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")


def is_right(text: str, answers: Sequence[str], match: str = "exact") -> bool:
    """Whether an answer is one of those that count as right.

    Example:
        >>> is_right("It is seven.", ["seven"]), is_right("It is seven.", ["seven"], "contains")
        (False, True)
    """
    given = normalized(text)
    if match == "exact":
        return any(given == normalized(answer) for answer in answers)
    return any(re.search(rf"(?<!\w){re.escape(normalized(answer))}(?!\w)", given) is not None for answer in answers)


def word_overlap(text: str, other: str) -> float:
    """F1 of the words that two texts share, counted with repetition; 1.0 if both are empty.

    Example:
        >>> word_overlap("red seven, blue two", "red seven, blue nine")
        0.75
    """
    own, others = (Counter(re.findall(r"\w+", part.casefold())) for part in (text, other))
    if not own and not others:
        return 1.0
    return 2 * (own & others).total() / (own.total() + others.total())
