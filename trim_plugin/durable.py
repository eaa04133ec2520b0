"""Files that interruptions leave whole: replaced at once, or grown by whole lines of JSON, and the settings they go with."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

#: How much is read at a time to find where the last whole line ends.
BLOCK = 1 << 16


@contextlib.contextmanager
def draft_of(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to. It takes the file's place when the block ends, and is gone if the block fails.

    Example:
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with draft_of(file) as draft:
        ...     _ = draft.write_text("all")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('all', 1)
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o666 & ~umask)  # a temporary file is its owner's alone
        with open(draft, "rb+") as written:
            os.fsync(written.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it.

    Example:
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_whole(file, "all")
        >>> file.read_text()
        'all'
    """
    with draft_of(file) as draft:
        draft.write_text(text, encoding="utf-8")


def whole_lines(data: bytes) -> tuple[list[bytes], int]:
    """The lines of `data` that are not empty, and the bytes up to the last one's end: what was cut off is no line.

    Example:
        >>> whole_lines(b'{"id": 1}' + bytes([10]) + b'{"id"')
        ([b'{"id": 1}'], 10)
    """
    end = data.rfind(b"\n") + 1
    return [line for line in data[:end].split(b"\n") if line.strip()], end


def append_lines(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append a line of JSON for each entry; they are on disk when this returns.

    A line that somebody who was killed while writing has left unfinished is cut off first, so only one may write at a time.
    """
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    with file.open("ab+") as opened:
        opened.truncate(_end_of_whole_lines(opened))
        opened.write("".join(lines).encode("utf-8", errors="replace"))
        opened.flush()
        os.fsync(opened.fileno())


def _end_of_whole_lines(opened: BinaryIO) -> int:
    """Bytes up to the last line's end, found from the end of the file, which may be long."""
    at = opened.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - BLOCK)
        opened.seek(start)
        found = opened.read(at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def check_settings(before: Path, settings: Mapping[str, Any], whose: str, another: str) -> None:
    """Compare settings with those in a file.

    Args:
        before: a JSON file that `write_whole` wrote.
        settings: those of now.
        whose: what goes with the settings, for the message.
        another: what may be given instead, for the message.

    Raises:
        ValueError: a setting differs.
    """
    known = json.loads(before.read_text(encoding="utf-8"))
    for name in sorted(set(known) | set(settings)):
        if known.get(name) != settings.get(name):
            raise ValueError(
                f"{whose} of another run ({name} was {known.get(name)!r}, now {settings.get(name)!r}). "
                f"Give another {another}, or remove this one."
            )
