"""Writes files that an interruption leaves whole, and opens files without waiting for a pipe or a device."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

#: What a draft is called: after its file, by chance, and after the machine that writes it.
_DRAFT = re.compile(r"\..*\.([0-9a-f]{8})\.draft", re.DOTALL)
_HOST = hashlib.blake2b(platform.node().encode(errors="replace"), digest_size=4).hexdigest()
_DAY = 24 * 3600.0
#: What else than a file may stand at a path.
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading. A pipe that nobody writes to, or a device, is an error at once instead of waiting for ever.

    Raises:
        OSError: it cannot be opened; `FileNotFoundError` if it is missing.
        ValueError: something else than a file stands there.

    Example:
        >>> open_regular(os.curdir)
        Traceback (most recent call last):
        ...
        ValueError: it is a folder, not a file
    """
    _check_regular(os.stat(path))  # opening alone can already do something to a device
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    opened = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_regular(os.fstat(opened.fileno()))  # another may stand there by now
    except ValueError:
        opened.close()
        raise
    return opened


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file")


@contextlib.contextmanager
def draft_of(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to. It takes the file's place when the block ends, and is gone if the block fails.

    A process that is killed leaves its draft behind: the next one that writes to the same folder removes it. The block must
    write into the file that it is given, not put another in its place.

    Raises:
        OSError: something else than a file stands there, a device for instance, whose place would be taken; or it cannot be
            written.

    Example:
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with draft_of(file) as draft:
        ...     _ = draft.write_text("all")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('all', 1)
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            _check_regular(os.stat(file))
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error), str(file)) from None
    _remove_abandoned(file.parent)
    held, draft = _new_draft(file)
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
        if held is not None:
            os.close(held)


def _new_draft(file: Path) -> tuple[int | None, Path]:
    """An empty file that this process holds locked, which tells others that it is being written."""
    while True:
        # A part of the name: with what is added, the whole may be longer than names may be.
        held, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:40]}.", suffix=f".{_HOST}.draft")
        if sys.platform == "win32":  # where a file that is open cannot be moved
            os.close(held)
            return None, Path(name)
        _lock(held, wait=True)
        if os.fstat(held).st_nlink:
            return held, Path(name)
        os.close(held)  # between making and locking it another process took it for abandoned


def _remove_abandoned(folder: Path) -> None:
    """Remove drafts that nobody holds any more; those of other machines, whose locks may not be seen here, a day later."""
    drafts = [(path, found[1]) for path in folder.iterdir() if (found := _DRAFT.fullmatch(path.name))]
    for draft, host in drafts:
        with contextlib.suppress(OSError):  # gone already, or somebody else's
            if host != _HOST and time.time() - draft.lstat().st_mtime < _DAY:
                continue
            held = os.open(draft, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(held, wait=False):
                    draft.unlink()
            finally:
                os.close(held)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file for this process, until it ends or closes it. Whether that worked: some file systems know no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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


def append_lines(file: Path, lines: Iterable[bytes]) -> None:
    """Append lines; they are on disk when this returns, or none of them is if the disk is full. Only one may write at a time."""
    data = memoryview(b"".join(line + b"\n" for line in lines))
    with file.open("ab", buffering=0) as opened:
        before = opened.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[opened.write(data) :]
            os.fsync(opened.fileno())
        except OSError:
            opened.truncate(before)
            raise
