"""A row, which is pictures and a question about them: the one format, read from files and checked here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from trim_plugin.durable import open_regular

FIELDS = ("id", "images", "question", "messages", "answer", "max_new_tokens")
#: What "images" may be called too; under these names one picture needs no list.
SPELLINGS = ("image", "picture", "pictures")
#: A picture: the name of a file, a file's bytes, or the picture itself.
Source = str | Path | bytes | Image.Image
#: Windows' editors begin a file with it.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: A sentence about a value shows this much of it.
MOST_CHARACTERS = 300

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class RowError(ValueError):
    """What is wrong with a row, in a sentence of bounded length; other rows are answered all the same."""

    def __init__(self, sentence: str) -> None:
        if len(sentence) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2 - 2
            sentence = f"{sentence[:half]} … {sentence[-half:]}"
        super().__init__(sentence.encode("utf-8", errors="replace").decode())


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it was read. Its pictures have not been looked at yet.

    Args:
        id: what its answer is filed under; None where a caller gives none.
        images: its pictures.
        question: what is asked, a text; empty if there are messages.
        messages: or a chat, each message with a list of parts.
        right: answers that count as right.
        max_new_tokens: longest answer, in text tokens; None leaves it to who answers.
        error: why the row cannot be answered, where that is known already.
        key: equal for rows of files that ask the same (`read_rows`).
        line: where it stands in its file, from 1.
    """

    id: Any = None
    images: tuple[Source, ...] = ()
    question: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    right: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    error: str = ""
    key: str = ""
    line: int = dataclasses.field(default=0, compare=False, repr=False)

    @classmethod
    def of(cls, given: Any) -> Row:
        """A row from an object of JSON, or from a dict that holds pictures themselves.

        Args:
            given: "question", or "messages" whose parts `{"type": "image"}` stand for the pictures in their order; "images", a
                list, perhaps spelled as in `SPELLINGS`; perhaps "id", "max_new_tokens", and "answer", a right one or several.

        Raises:
            RowError: it has unknown fields, or one has a value that is not allowed.

        Example:
            >>> Row.of({"id": 7, "picture": "a.png", "question": "How many?", "answer": "two"})
            Row(id=7, images=('a.png',), question='How many?', messages=(), right=('two',), ...)
            >>> Row.of({"question": " "})
            Traceback (most recent call last):
            ...
            trim_plugin.asking.rows.RowError: 'question' must be a text that is not empty, got ' '
        """
        if isinstance(given, Row):
            if given.error:
                raise RowError(given.error)
            return given
        if not isinstance(given, Mapping):
            raise RowError(
                f"a row must be an object such as {{'images': [...], 'question': ...}}, got {type(given).__name__}"
            )
        unknown = sorted(str(name) for name in given if name not in (*FIELDS, *SPELLINGS))
        if unknown:
            raise RowError(f"unknown field {unknown[0]!r}. Allowed: {', '.join(FIELDS)}")
        images = tuple(_image(image) for image in _images(given))
        question, messages = given.get("question"), given.get("messages")
        if (question is None) == (messages is None):
            raise RowError("give either 'question' or 'messages'")
        if question is not None and (not isinstance(question, str) or not question.strip()):
            raise RowError(f"'question' must be a text that is not empty, got {_repr.repr(question)}")
        return cls(
            id=given.get("id"),
            images=images,
            question=question or "",
            messages=() if messages is None else _chat(messages),
            right=_right(given.get("answer")),
            max_new_tokens=_count(given.get("max_new_tokens")),
        )

    @property
    def text(self) -> str:
        """What is asked, for a person to read: the question, or the chat's last text."""
        parts = [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]
        return self.question or (parts[-1] if parts else "")

    @property
    def names(self) -> tuple[str, ...]:
        """What its pictures are called."""
        return tuple(str(image) if isinstance(image, str | Path) else "a picture" for image in self.images)


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON Lines file, a line each. One that cannot be answered stands there all the same, with an `error`.

    A row without an "id" of its own is known by the number of its line. Its `key` then does not hold that number, since lines are
    inserted and removed, but how many rows before it ask the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder or a pipe, it holds no row, or two rows have the same "id".

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "questions.jsonl"
        >>> _ = file.write_text('{"id": "a", "question": "How many?"}' + chr(10) + '{"question": ""}')
        >>> [(row.id, row.error) for row in read_rows(file)]
        [('a', ''), ('2', "'question' must be a text that is not empty, got ''")]
    """
    rows: list[tuple[int, Row]] = []
    numbers: dict[str, int] = {}
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BYTE_ORDER_MARK).strip()
            if not line:
                continue
            row = _of_line(line, number)
            if row.id is not None:
                if row.id in numbers:
                    raise ValueError(
                        f"{file.name}, line {number}: the id {row.id!r} is that of line {numbers[row.id]}, too"
                    )
                numbers[row.id] = number
            rows.append((number, row))
    if not rows:
        raise ValueError(f"{file} is empty")
    alike: Counter[str] = Counter()
    return [row if row.id is not None else _numbered(row, number, numbers, alike) for number, row in rows]


def _opened(file: Path) -> BinaryIO:
    try:
        return open_regular(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {file}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def _of_line(line: bytes, number: int) -> Row:
    """The row of a line; its id is None if it has none of its own."""
    name = None
    try:
        given = _parsed(line, number)
        if not isinstance(given, Mapping):
            raise RowError(f"line {number} is not an object such as {{'images': [...], 'question': ...}}")
        name = _name(given.get("id"))
        row = dataclasses.replace(Row.of(given), id=name)
        check_encodable(json.dumps([row.question, row.messages, row.right], ensure_ascii=False))
        asked = json.dumps([row.images, row.question, row.messages, row.max_new_tokens], sort_keys=True).encode()
    except RowError as error:
        row, asked = Row(id=name, error=str(error)), line
    except RecursionError:
        row, asked = Row(id=name, error=f"line {number} is nested too deeply"), line
    return dataclasses.replace(row, line=number, key=hashlib.blake2b(asked, digest_size=12).hexdigest())


def _numbered(row: Row, number: int, taken: Mapping[str, int], alike: Counter[str]) -> Row:
    """A row without an id of its own, named by its line; its key counts the rows before it that ask the same."""
    alike[row.key] += 1
    name = str(number)
    while name in taken:
        name = f"line {name}"
    return dataclasses.replace(row, id=name, key=f"{row.key}-{alike[row.key]}")


def _parsed(line: bytes, number: int) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"line {number} is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise RowError(f"line {number} is not JSON: {error}") from None
    except ValueError:  # Python reads whole numbers of so many digits alone
        raise RowError(f"line {number} has a number of too many digits") from None


def _name(given: Any) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str | int | float) or isinstance(given, bool):
        raise RowError(f"'id' must be a text or a number, got {_repr.repr(given)}")
    check_encodable(str(given))
    return str(given)


def check_encodable(text: str) -> None:
    """Raise `RowError` for half of a surrogate pair, which JSON can spell and no tokenizer or file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"half of a surrogate pair is no character: \\u{ord(text[error.start]):04x}") from None


def _images(given: Mapping[str, Any]) -> Sequence[Any]:
    names = [name for name in ("images", *SPELLINGS) if given.get(name) is not None]
    if len(names) > 1:
        raise RowError(f"{names[0]!r} and {names[1]!r} are both given: they mean the same")
    if not names:
        return ()
    images = given[names[0]]
    alone = isinstance(images, str | bytes | Path | Image.Image)
    if alone and names != ["images"]:
        return (images,)
    if alone or isinstance(images, Mapping) or not hasattr(images, "__iter__"):
        raise RowError(f"{names[0]!r} must be a list, got {type(images).__name__}")
    images = list(images)
    if not images and names != ["images"]:
        raise RowError(f"{names[0]!r} names no picture; leave it out for a text alone")
    return images


def _image(image: Any) -> Source:
    if isinstance(image, bytes | Image.Image) or (isinstance(image, str | Path) and str(image)):
        return image
    raise RowError(f"an image must be a file's name, its bytes or a picture, got {_repr.repr(image)}")


def _chat(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RowError(f"'messages' must be a list that is not empty, got {_repr.repr(messages)}")
    return tuple(_message(message) for message in messages)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise RowError(f"a message must have a 'role' and a 'content', got {_repr.repr(message)}")
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError(f"a message's 'content' must be a text or a list of parts, got {_repr.repr(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise RowError(
                "a part of a message must be {'type': 'text', 'text': ...} or {'type': 'image'}, "
                f"got {_repr.repr(part)}"
            )
    return {**message, "content": [dict(part) for part in content]}


def _right(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    several = given if isinstance(given, list) else [given]
    texts = tuple(str(one) for one in several if isinstance(one, str | int | float) and not isinstance(one, bool))
    if not texts or len(texts) < len(several):
        raise RowError(f"'answer' must be a text or a list of texts, got {_repr.repr(given)}")
    return texts


def _count(given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise RowError(f"'max_new_tokens' must be a positive number, got {_repr.repr(given)}")
    return given
