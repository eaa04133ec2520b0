"""A JSON Lines file of results: every row is answered once, and a run goes on after any interruption."""

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
from trim_plugin.durable import append_lines, check_settings, draft_of, whole_lines, write_whole

#: What has a result: a row's id, and the name of the variant that answered it, where variants are compared.
Slot = tuple[str, str]
#: How every line begins that is written here. Whatever else stands at a file's end was not cut off by an interruption.
BEGINNING = b'{"id": "'
#: The entry of the settings' file that changes whenever the file of results is replaced instead of grown.
MARK = "mark"


class Results:
    """The results so far of a run over rows.

    Every line says in "key" with which settings it was made and what was asked, so that it goes with its row wherever that row
    stands in a file that has been edited since. A result whose row asks something else by now is set aside, in a file beside
    this one, and the row is asked again. A result without a key was written by something else: it goes with the row of its id.

    Several processes may hold the same file: each writes under a lock, whole lines only, and leaves out what is there. Beside the
    file lie its settings and its lock.

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

    def __init__(self, file: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is a folder, a pipe or a device; results need a file")
        self.file = file.resolve()  # of a link, what it leads to
        #: Results that went with none of the rows were moved there; so many this time.
        self.aside, self.set_aside = self.file.with_name(f"{self.file.name}.replaced.jsonl"), 0
        self._settings_file = self.file.with_name(f"{self.file.name}.settings.json")
        # As they come back from their file.
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        run = hashlib.blake2b(json.dumps(self._settings, sort_keys=True).encode(), digest_size=6).hexdigest()
        self._keys = {row.id: f"{run}:{row.key}" for row in rows}
        self._by_number = {key: name for name, key in self._keys.items() if _by_number(key)}
        self._run = run
        #: Every slot that has a result, as far as this process has seen, and whether that is an error.
        self._failed: dict[Slot, bool] = {}
        self._seen = 0
        self._mark: Any = None
        self._lock = FileLock(f"{self.file}.lock")
        with self._locked():
            self._begin()

    def has(self, name: str, way: str = "") -> bool:
        """Whether a row has a result, as far as this process has seen."""
        return (name, way) in self._failed

    def failed(self, name: str, way: str = "") -> bool:
        """Whether a row's result is an error."""
        return self._failed.get((name, way), False)

    def read(self) -> list[dict[str, Any]]:
        """All results that are in the file now."""
        with self._locked():
            self._catch_up()
            return [result for line in self._lines(0) if (result := self._result(line)) is not None]

    def add(self, results: Iterable[Mapping[str, Any]]) -> int:
        """Append results: "id", "answer" or "error", and perhaps "way", the variant. They are on disk when this returns.

        What has a result already is left out. Returns how many were appended.
        """
        with self._locked():
            self._catch_up()
            new = {}
            for result in results:
                slot = _slot(result)
                if slot not in self._failed and slot not in new:
                    key = self._keys.get(slot[0])
                    new[slot] = {**result, "id": slot[0]} | ({} if key is None else {"key": key})
            if new:
                append_lines(self.file, [_line(result) for result in new.values()])
                self._catch_up()
            return len(new)

    def forget_errors(self, names: Collection[str]) -> None:
        """Take out the results of these rows that are errors, so that the rows are asked again."""
        with self._locked():
            self._catch_up()
            gone = {slot for slot, failed in self._failed.items() if failed and slot[0] in names}
            if gone:
                found = ((line, self._result(line)) for line in self._lines(0))
                self._replace([line for line, result in found if result is None or _slot(result) not in gone])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except OSError as error:
            raise OSError(f"cannot write {self.file}: {error.strerror or error}") from None

    def _begin(self) -> None:
        """Check whose results these are, and let them go with the rows as they are now."""
        lines = self._lines(0)
        results = [self._result(line) for line in lines]
        if lines and not any(results):
            raise ValueError(self._foreign(lines[0]))
        before = self._read_settings()
        if lines and before is not None:
            self._check_settings(before)
        kept: dict[Slot, tuple[bytes, bool]] = {}
        aside = []
        for line, result in zip(lines, results, strict=True):
            name = None if result is None else self._row_of(result)
            if result is None or name is None:
                aside.append(line)
                continue
            slot, failed = (name, _slot(result)[1]), "error" in result
            if slot in kept and (failed or not kept[slot][1]):  # an answer counts more than an error
                aside.append(line)
            else:
                aside += [kept[slot][0]] if slot in kept else []
                kept[slot] = (line if name == result["id"] else _line({**result, "id": name})), failed
        if aside:
            append_lines(self.aside, aside)
            self.set_aside = len(aside)
        settled = [line for line, _ in kept.values()]
        if settled != lines:
            self._replace(settled)
            return
        if not lines or before is None:
            self._write_settings()
        self._catch_up()

    def _row_of(self, result: Mapping[str, Any]) -> str | None:
        """The id of the row that a result goes with; its own id if that is none of these rows'; None if it goes with none."""
        name, key = _slot(result)[0], result.get("key")
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
        settings = self._read_settings()
        if settings is None:
            settings = self._write_settings()
        self._check_settings(settings)
        size = self.file.stat().st_size if self.file.exists() else 0
        if settings.get(MARK) != self._mark or size < self._seen:
            self._failed.clear()
            self._seen, self._mark = 0, settings.get(MARK)
        if size > self._seen:
            for line in self._lines(self._seen):
                result = self._result(line)
                if result is not None:
                    self._failed[_slot(result)] = "error" in result
            self._seen = self.file.stat().st_size

    def _lines(self, start: int) -> list[bytes]:
        """The lines from there on. The last may lack its end: it is completed if only that is missing, or else set aside."""
        if not self.file.exists():
            return []
        with self.file.open("rb+") as opened:
            opened.seek(start)
            data = opened.read()
            lines, length = whole_lines(data)
            rest = data[length:].rstrip(b"\0")  # which a power failure leaves
            if rest and self._result(rest) is not None:
                opened.seek(start + length)
                opened.write(rest + b"\n")
                lines, length = [*lines, rest], length + len(rest) + 1
            elif rest:
                if not rest.startswith(BEGINNING[: len(rest)]):
                    raise ValueError(self._foreign(rest))
                append_lines(self.aside, [rest])
            if length < len(data):
                opened.truncate(start + length)
        return lines

    def _result(self, line: bytes) -> dict[str, Any] | None:
        """What stands in a line, None if it is damaged; `ValueError` if it is something else than a result."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        is_result = isinstance(found, dict) and isinstance(found.get("id"), str | int)
        if not is_result or not {"answer", "error"} & set(found) or {"question", "messages"} & set(found):
            raise ValueError(self._foreign(line))
        return found

    def _foreign(self, line: bytes) -> str:
        shown = line[:60].decode(errors="replace")
        return f"{self.file} is no file of results: {shown!r} stands in it. Give another file."

    def _replace(self, lines: Sequence[bytes]) -> None:
        # The mark first: whoever dies in between has only made others read everything again.
        self._write_settings()
        with draft_of(self.file) as draft:
            draft.write_bytes(b"".join(line + b"\n" for line in lines))
        self._catch_up()

    def _read_settings(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._settings_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write_settings(self) -> dict[str, Any]:
        settings = {**self._settings, MARK: secrets.token_hex(8)}
        write_whole(self._settings_file, json.dumps(settings, indent=2) + "\n")
        return settings

    def _check_settings(self, known: Mapping[str, Any]) -> None:
        before = {name: value for name, value in known.items() if name != MARK}
        check_settings(before, self._settings, f"{self.file} holds the results", "file")


def _slot(result: Mapping[str, Any]) -> Slot:
    return str(result["id"]), result.get("way", "")


def _line(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result, ensure_ascii=False).encode("utf-8", errors="replace")


def _by_number(key: str) -> bool:
    """Whether it is the key of a row without an id of its own: `read_rows` counts those that are alike."""
    return "-" in key
