"""A user's questions about pictures, from a JSON Lines file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

QUESTIONS = "questions.jsonl"


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a questions file.

    Args:
        name: what the answers are filed under; unique.
        pictures: picture files, all read by the question.
        text: the question.
        answers: what counts as right; empty if that is not known.
    """

    name: str
    pictures: tuple[Path, ...]
    text: str
    answers: tuple[str, ...] = ()


def read_questions(folder: Path, file: Path | None = None) -> list[Question]:
    """Read a questions file: JSON Lines with "picture" (or "pictures"), "question", and perhaps "answer" and "id".

    Pictures are named relative to `folder`; "answer" is a text or a list of texts that all count as right.

    Args:
        folder: where the pictures are.
        file: the questions; `questions.jsonl` in the folder by default.

    Raises:
        FileNotFoundError: no such file, or a picture is missing.
        ValueError: a line is not what is asked for; the message names it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "questions.jsonl").write_text('{"picture": "a.png", "question": "How many?"}')
        >>> read_questions(folder)
        Traceback (most recent call last):
        ...
        FileNotFoundError: questions.jsonl, line 1: no such picture: a.png
    """
    file = folder / QUESTIONS if file is None else file
    if not file.is_file():
        raise FileNotFoundError(f"no questions: {file} does not exist")
    questions: list[Question] = []
    names: set[str] = set()
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        question = _question(line, folder, where, str(number))
        if question.name in names:
            raise ValueError(f"{where}: the id {question.name!r} occurs twice")
        names.add(question.name)
        questions.append(question)
    if not questions:
        raise ValueError(f"no questions: {file} is empty")
    return questions


def _lines(file: Path) -> list[str]:
    try:
        # Windows editors begin UTF-8 with a mark; and only a line feed ends a line of JSON Lines.
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _question(line: str, folder: Path, where: str, name: str) -> Question:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object like {{'picture': 'a.png', 'question': 'How many?'}}")
    unknown = sorted(set(entry) - {"id", "picture", "pictures", "question", "answer"})
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}. Allowed: id, picture, pictures, question, answer")
    if ("picture" in entry) == ("pictures" in entry):
        raise ValueError(f"{where}: give either 'picture' or 'pictures'")
    given = _texts(entry.get("pictures", entry.get("picture")), f"{where}: 'picture'")
    text = _texts(entry.get("question"), f"{where}: 'question'")
    if len(text) != 1 or not text[0].strip():
        raise ValueError(f"{where}: 'question' must be a text")
    pictures = tuple(folder / picture for picture in given)
    for picture, as_given in zip(pictures, given, strict=True):
        if not picture.is_file():
            raise FileNotFoundError(f"{where}: no such picture: {as_given}")
    answers = () if entry.get("answer") is None else _texts(entry["answer"], f"{where}: 'answer'")
    return Question(str(entry.get("id", name)), pictures, text[0], answers)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, str) for entry in values):
        raise ValueError(f"{name} must be a text or a list of texts, got {value!r}")
    return tuple(values)
