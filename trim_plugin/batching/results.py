"""Results in one JSON Lines file: durable, each id once, shared by processes, and gone on with after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from trim_plugin.durable import append_lines, check_settings, draft_of, whole_lines, write_whole


class Results:
    """The results so far of a run over many rows.

    Several processes may hold the same file: every one writes under a lock, whole lines only, and leaves out ids that are there.
    What an interruption cut off is dropped by whoever writes next. Beside the file lie its settings and its lock.

    Args:
        file: made at the first result.
        settings: what the results depend on; results of other settings are refused.

    Raises:
        ValueError: the file was written with other settings, or is no file of results.
        OSError: it cannot be read or written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "answers.jsonl"
        >>> Results(file, {"model": "small"}).add([{"id": "1", "answer": "seven"}, {"id": "1", "answer": "seven"}])
        1
        >>> sorted(Results(file, {"model": "small"}).ids)
        ['1']
        >>> Results(file, {"model": "large"})
        Traceback (most recent call last):
        ...
        ValueError: ...answers.jsonl holds the results of another run (model was 'small', now 'large'). Give another file...
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        #: Ids that have a result, as far as this process has seen.
        self.ids: set[str] = set()
        #: Those of them whose result is an error.
        self.failed: set[str] = set()
        self._seen = 0
        self._inode = -1
        self._lock = FileLock(f"{file}.lock")
        with self._lock:
            self._catch_up()
            self._check_settings(dict(settings))

    def add(self, results: Iterable[Mapping[str, Any]]) -> int:
        """Append results; they are on disk when this returns.

        Args:
            results: each with an "id", a text; those whose id has a result already are left out.

        Returns:
            How many were appended.
        """
        with self._lock:
            self._catch_up()
            new = []
            for result in results:
                if result["id"] not in self.ids:
                    self._note(result)
                    new.append(result)
            if new:
                append_lines(self.file, new)
                status = self.file.stat()
                self._seen, self._inode = status.st_size, status.st_ino
            return len(new)

    def forget_errors(self, ids: Collection[str]) -> None:
        """Take out the results of these ids that are errors, so that their rows are answered again."""
        with self._lock:
            self._catch_up()
            gone = self.failed.intersection(ids)
            if not gone:
                return
            lines, _ = whole_lines(self.file.read_bytes())
            kept = [line for line in lines if str(json.loads(line)["id"]) not in gone]
            with draft_of(self.file) as draft:
                draft.write_bytes(b"".join(line + b"\n" for line in kept))
            self._catch_up()

    def _catch_up(self) -> None:
        """Read what was appended since the last look; a line that is cut off does not count."""
        if not self.file.is_file():
            return
        with self.file.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:  # the first look, or some process took errors out
                self.ids.clear()
                self.failed.clear()
                self._seen, self._inode = 0, inode
            file.seek(self._seen)
            lines, length = whole_lines(file.read())
        for line in lines:
            try:
                self._note(json.loads(line))
            except (ValueError, TypeError, KeyError):
                shown = line[:60].decode(errors="replace")
                raise ValueError(
                    f"{self.file} is no file of results: {shown!r} stands in it. Give another file."
                ) from None
        self._seen += length

    def _note(self, result: Mapping[str, Any]) -> None:
        self.ids.add(str(result["id"]))
        if "error" in result:
            self.failed.add(str(result["id"]))

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.file.with_name(f"{self.file.name}.settings.json")
        if self.file.is_file() and file.is_file():
            check_settings(file, settings, f"{self.file} holds the results", "file")
        else:
            write_whole(file, json.dumps(settings, indent=2) + "\n")
