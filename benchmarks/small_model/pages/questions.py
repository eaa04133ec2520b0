"""Questions about a page in plain English, with their true answers as the tokenizer writes them."""

from __future__ import annotations

import numpy as np

from benchmarks.small_model.pages.scenes import LABELS, Page
from benchmarks.small_model.questions import NUMBERS

TRAINED_TYPES = ("number", "label", "absent", "lines", "page")
"""Question types that the model "pages" is trained for."""

UNTRAINED_TYPES = ("last",)
"""Question types that it has never seen, for adapters to learn; the tokenizer knows their words."""

WORDINGS = {
    "number": ("What number is {}?", "Which number is {}?", "What is the number of {}?"),
    "label": ("Which name has {}?", "What name has {}?", "What is the name of {}?"),
    "lines": ("How many numbers are there?", "Count the numbers."),
    "page": ("Read all numbers.", "Read all the numbers.", "List all numbers."),
    "last": ("What is the last number?", "Which number is the last?"),
}
"""The first wording of each type is the one that evaluation uses."""


def spoken(number: str) -> str:
    """A number as the tokenizer writes it, digit by digit.

    Example:
        >>> spoken("271")
        '2 7 1'
    """
    return " ".join(number)


def answer(page: Page, kind: str, subject: str = "") -> str:
    """The true answer. ``subject`` is a label for "number" and a number for "label".

    "none" is the answer about what doesn't stand on the page. Reading a page goes from top to bottom.
    """
    if kind == "number":
        return next((spoken(line.number) for line in page.lines if line.label == subject), "none")
    if kind == "label":
        return next((line.label for line in page.lines if line.number == subject), "none")
    if kind == "lines":
        return NUMBERS[len(page.lines)]
    if kind == "page":
        return ", ".join(f"{line.label} {spoken(line.number)}" for line in page.lines)
    if kind == "last":
        return spoken(page.lines[-1].number)
    raise ValueError(f"kind must be one of {tuple(WORDINGS)}, got {kind!r}")


def absent_number(page: Page, rng: np.random.Generator, near: float = 0.0) -> str:
    """A number that doesn't stand on the page; in a share ``near`` of the cases one digit away from one that does."""
    shown = {line.number for line in page.lines}
    while True:
        number = str(rng.integers(10 ** int(rng.integers(1, 4))))
        if rng.random() < near:
            digits = list(page.lines[rng.integers(len(page.lines))].number)
            digits[rng.integers(len(digits))] = str(rng.integers(10))
            number = str(int("".join(digits)))
        if number not in shown:
            return number


def about(page: Page, kind: str, subject: str, rng: np.random.Generator, vary: bool) -> tuple[str, str]:
    """The question of a type about a subject, and its answer; ``vary`` draws the wording."""
    wordings = WORDINGS[kind]
    wording = wordings[rng.integers(len(wordings)) if vary else 0]
    return wording.format(subject), answer(page, kind, subject)


def ask(page: Page, kind: str, rng: np.random.Generator, *, vary: bool = False) -> tuple[str, str]:
    """Make a question of this type and its true answer.

    Args:
        page: the page that is asked about.
        kind: one of :data:`TRAINED_TYPES` or :data:`UNTRAINED_TYPES`. "absent" asks, one time in two each, for the number of a
            label and for the label of a number that don't stand on the page (on one with all eight labels always for the latter).
        rng: chooses what is asked for.
        vary: draw the wording too.
    """
    shown = page.lines[rng.integers(len(page.lines))]
    if kind == "number":
        return about(page, kind, shown.label, rng, vary)
    if kind == "label":
        return about(page, kind, shown.number, rng, vary)
    if kind == "absent":
        missing = [label for label in LABELS if all(line.label != label for line in page.lines)]
        if missing and rng.random() < 0.5:
            return about(page, "number", missing[rng.integers(len(missing))], rng, vary)
        return about(page, "label", absent_number(page, rng), rng, vary)
    return about(page, kind, "", rng, vary)


def training_questions(page: Page, rng: np.random.Generator) -> list[tuple[str, str]]:
    """What training asks about a page: to read it, to count its lines, two absent things, some numbers, and most labels.

    All share one reading of the picture, so that a question more costs little.
    """
    order = [page.lines[index] for index in rng.permutation(len(page.lines))]
    pairs = [ask(page, "page", rng, vary=True), ask(page, "lines", rng, vary=True), ask(page, "absent", rng, vary=True)]
    pairs.append(about(page, "label", absent_number(page, rng, near=0.6), rng, vary=True))
    pairs += [about(page, "number", line.label, rng, vary=True) for line in order[:4]]
    pairs += [about(page, "label", line.number, rng, vary=True) for line in order[-6:]]
    return pairs


__all__ = [
    "TRAINED_TYPES",
    "UNTRAINED_TYPES",
    "WORDINGS",
    "about",
    "absent_number",
    "answer",
    "ask",
    "spoken",
    "training_questions",
]
