"""A user's questions about pictures, from a file of rows (`asking.rows`)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from trim_plugin.asking.rows import Row, RowError, read_rows

QUESTIONS = "questions.jsonl"


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of a questions file.

    Args:
        name: what the answers are filed under; unique.
        pictures: picture files, all read by the question.
        text: the question, or the last text of a chat.
        answers: what counts as right; empty if that is not known.
        messages: the chat that is asked in place of `text`, if it is one.
        max_new_tokens: longest answer, in text tokens; None leaves it to who answers.
    """

    name: str
    pictures: tuple[Path, ...]
    text: str
    answers: tuple[str, ...] = ()
    messages: tuple[dict[str, Any], ...] = dataclasses.field(default=(), hash=False)
    max_new_tokens: int | None = None

    @property
    def row(self) -> Row:
        """As it is asked."""
        text = "" if self.messages else self.text
        return Row(self.name, self.pictures, text, self.messages, max_new_tokens=self.max_new_tokens)


def read_questions(folder: Path, file: Path | None = None) -> list[Question]:
    """Read a questions file: rows as `trim-plugin batch` takes them, in JSON Lines.

    Pictures are named relative to `folder`; "answer" is a text or a list of texts that all count as right.

    Args:
        folder: where the pictures are.
        file: the questions; `questions.jsonl` in the folder by default.

    Raises:
        FileNotFoundError: no such file, or a picture is missing.
        ValueError: a row is not what is asked for; the message names its line.

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
    questions = []
    for row in read_rows(file):
        where = f"{file.name}, line {row.line}"
        if row.error:
            # What is wrong with a whole line names it already.
            names_it = row.error.startswith(f"line {row.line} ")
            raise RowError(f"{file.name}, {row.error}" if names_it else f"{where}: {row.error}")
        pictures = tuple(folder / name for name in row.names)
        for picture, given in zip(pictures, row.names, strict=True):
            if not os.path.exists(picture):
                raise FileNotFoundError(f"{where}: no such picture: {given}")
        questions.append(Question(row.id, pictures, row.text, row.right, row.messages, row.max_new_tokens))
    return questions
