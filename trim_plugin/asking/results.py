"""JSON Lines files of results: every row is answered once, and a run goes on after any interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from trim_plugin.asking.rows import Row
from trim_plugin.durable import append_lines, draft_of, whole_lines, write_whole

#: The entry of the settings' file that changes whenever a file of results is replaced instead of grown.
MARK = "mark"


class ResultFile:
    """A JSON Lines file that several processes append whole lines to, under a lock, if their settings are the same.

    `Results` and `evaluation.AnswerLog` say what a line holds. What they do with the file they do within `_locked`.

    Args:
        file: made at the first line.
        settings: what the results depend on.
        folder: where several files lie that share settings and lock; without it, these lie beside the file.
    """

    #: The field that every line begins with. Whatever else stands at a file's end was not cut off by an interruption.
    FIRST: str
    #: What the lines are, in an error message.
    CALLED: str

    def __init__(self, file: Path, settings: Mapping[str, Any], folder: Path | None = None) -> None:
        self.file, self._holder = file, folder or file
        self._another = "Give another file" if folder is None else "Give another folder"
        beside = f"{file}." if folder is None else f"{folder}/"
        #: What was cut off or replaced was moved there.
        self.aside = Path(f"{beside}replaced.jsonl")
        self._settings_file, self._lock = Path(f"{beside}settings.json"), FileLock(f"{beside}lock")
        # As they come back from their file.
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))

    def _is_result(self, found: Mapping[str, Any]) -> bool:
        """Whether these are the fields of a line."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                yield
        except OSError as error:
            raise OSError(f"cannot write {self.file}: {error.strerror or error}") from None

    def _lines(self, file: Path, start: int = 0) -> list[tuple[bytes, dict[str, Any] | None]]:
        """The lines from there on, each with what stands in it, None if it is damaged; `ValueError` if that is no result.

        The last may lack its end: it is completed if only that is missing, or else set aside.
        """
        if not file.exists():
            return []
        with file.open("rb+") as opened:
            opened.seek(start)
            data = opened.read()
            lines, length = whole_lines(data)
            found = [(line, self._result(line, file)) for line in lines]
            rest = data[length:].rstrip(b"\0")  # which a power failure leaves
            if rest and (last := self._result(rest, file)) is not None:
                opened.seek(start + length)
                opened.write(rest + b"\n")
                found, length = [*found, (rest, last)], length + len(rest) + 1
            elif rest:
                if not rest.startswith(f'{{"{self.FIRST}": "'.encode()[: len(rest)]):
                    raise self._foreign(rest, file)
                append_lines(self.aside, [rest])
            if length < len(data):
                opened.truncate(start + length)
        return found

    def _result(self, line: bytes, file: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not self._is_result(found):
            raise self._foreign(line, file)
        return found

    def _foreign(self, line: bytes, file: Path) -> ValueError:
        shown = line[:60].decode(errors="replace")
        return ValueError(f"{file} is no file of results: {shown!r} stands in it. {self._another}.")

    def _known_settings(self) -> dict[str, Any] | None:
        """What the settings' file says, None if it says nothing; `ValueError` if that is another run's."""
        try:
            known = json.loads(self._settings_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(known, dict):
            return None
        for name in sorted((set(known) | set(self._settings)) - {MARK}):
            if known.get(name) != self._settings.get(name):
                raise ValueError(
                    f"{self._holder} holds {self.CALLED} of another run ({name} was {known.get(name)!r}, "
                    f"now {self._settings.get(name)!r}). {self._another}, or remove this one."
                )
        return known

    def _check_settings(self) -> dict[str, Any]:
        """The settings in that file, which are written if there are none."""
        return self._known_settings() or self._write_settings()

    def _write_settings(self) -> dict[str, Any]:
        settings = {**self._settings, MARK: secrets.token_hex(8)}
        write_whole(self._settings_file, json.dumps(settings, indent=2) + "\n")
        return settings


class Results(ResultFile):
    """The results so far of a run over rows.

    Every line says in "key" with which settings it was made and what was asked, so that it goes with its row wherever that row
    stands in a file that has been edited since. A result whose row asks something else by now is set aside, in a file beside
    this one, and the row is asked again. A result without a key was written by something else: it goes with the row of its id.
    What another process has answered is left out.

    Args:
        file: made at the first result.
        settings: what the results depend on; results of other settings are refused.
        rows: of `read_rows`: all rows of a file, whichever of them this process answers.

    Raises:
        ValueError: the file was written with other settings, or is no file of results. It is left as it is.
        OSError: it cannot be read or written.

    Example:
        >>> import tempfile
        >>> file, row = Path(tempfile.mkdtemp()) / "answers.jsonl", Row("1", question="Which?", key="k")
        >>> Results(file, {"model": "small"}, [row]).add([{"id": "1", "answer": "seven"}, {"id": "1", "answer": "seven"}])
        1
        >>> Results(file, {"model": "small"}, [row]).has("1")
        True
        >>> Results(file, {"model": "large"}, [row])
        Traceback (most recent call last):
        ...
        ValueError: ...answers.jsonl holds the results of another run (model was 'small', now 'large'). Give another file...
    """

    FIRST, CALLED = "id", "the results"

    def __init__(self, file: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is a folder, a pipe or a device; results need a file")
        super().__init__(file.resolve(), settings)  # of a link, what it leads to
        #: So many results went with none of the rows this time.
        self.set_aside = 0
        self._run = hashlib.blake2b(json.dumps(self._settings, sort_keys=True).encode(), digest_size=6).hexdigest()
        self._keys = {row.id: f"{self._run}:{row.key}" for row in rows}
        self._by_number = {key: name for name, key in self._keys.items() if _by_number(key)}
        #: Every row that has a result, as far as this process has seen, and whether that is an error.
        self._failed: dict[str, bool] = {}
        self._seen = 0
        self._mark: Any = None
        with self._locked():
            self._begin()

    def has(self, name: str) -> bool:
        """Whether a row has a result, as far as this process has seen."""
        return name in self._failed

    def read(self) -> list[dict[str, Any]]:
        """All results that are in the file now."""
        with self._locked():
            self._catch_up()
            return [result for _, result in self._lines(self.file) if result is not None]

    def add(self, results: Iterable[Mapping[str, Any]]) -> int:
        """Append results: "id", "answer" or "error". They are on disk when this returns.

        What has a result already is left out. Returns how many were appended.
        """
        with self._locked():
            self._catch_up()
            new = {}
            for result in results:
                name = str(result["id"])
                if name not in self._failed and name not in new:
                    key = self._keys.get(name)
                    new[name] = {**result, "id": name} | ({} if key is None else {"key": key})
            if new:
                append_lines(self.file, [_line(result) for result in new.values()])
                self._catch_up()
            return len(new)

    def forget_errors(self, names: Collection[str]) -> None:
        """Take out the results of these rows that are errors, so that the rows are asked again."""
        with self._locked():
            self._catch_up()
            gone = {name for name, failed in self._failed.items() if failed and name in names}
            if gone:
                found = self._lines(self.file)
                self._replace([line for line, result in found if result is None or str(result["id"]) not in gone])

    def _is_result(self, found: Mapping[str, Any]) -> bool:
        has_end = not {"answer", "error"}.isdisjoint(found) and {"question", "messages"}.isdisjoint(found)
        return has_end and isinstance(found.get("id"), str | int)

    def _begin(self) -> None:
        """Check whose results these are, and let them go with the rows as they are now."""
        lines = self._lines(self.file)
        if lines and not any(result for _, result in lines):
            raise self._foreign(lines[0][0], self.file)
        before = self._known_settings() if lines else None
        kept: dict[str, tuple[bytes, bool]] = {}
        aside = []
        for line, result in lines:
            name = None if result is None else self._row_of(result)
            if result is None or name is None:
                aside.append(line)
                continue
            failed = "error" in result
            if name in kept and (failed or not kept[name][1]):  # an answer counts more than an error
                aside.append(line)
            else:
                aside += [kept[name][0]] if name in kept else []
                kept[name] = (line if name == result["id"] else _line({**result, "id": name})), failed
        if aside:
            append_lines(self.aside, aside)
            self.set_aside = len(aside)
        settled = [line for line, _ in kept.values()]
        if settled != [line for line, _ in lines]:
            self._replace(settled)
            return
        if before is None:
            self._write_settings()
        self._catch_up()

    def _row_of(self, result: Mapping[str, Any]) -> str | None:
        """The id of the row that a result goes with; its own id if that is none of these rows'; None if it goes with none."""
        name, key = str(result["id"]), result.get("key")
        known = self._keys.get(name)
        if not isinstance(key, str):
            return None if known is not None and _by_number(known) else name
        if not key.startswith(f"{self._run}:"):
            raise ValueError(
                f"{self.file} holds the results of another run, made with other settings. Give another file, or remove this one."
            )
        if _by_number(key):
            return self._by_number.get(key)
        return name if known in (None, key) else None

    def _catch_up(self) -> None:
        """Read what was appended since the last look, or everything if a process has replaced the file meanwhile."""
        settings = self._check_settings()
        size = self.file.stat().st_size if self.file.exists() else 0
        if settings.get(MARK) != self._mark or size < self._seen:
            self._failed.clear()
            self._seen, self._mark = 0, settings.get(MARK)
        if size > self._seen:
            for _, result in self._lines(self.file, self._seen):
                if result is not None:
                    self._failed[str(result["id"])] = "error" in result
            self._seen = self.file.stat().st_size

    def _replace(self, lines: Sequence[bytes]) -> None:
        # The mark first: whoever dies in between has only made others read everything again.
        self._write_settings()
        with draft_of(self.file) as draft:
            draft.write_bytes(b"".join(line + b"\n" for line in lines))
        self._catch_up()


def _line(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result, ensure_ascii=False).encode("utf-8", errors="replace")


def _by_number(key: str) -> bool:
    """Whether it is the key of a row without an id of its own: `read_rows` counts those that are alike."""
    return "-" in key
