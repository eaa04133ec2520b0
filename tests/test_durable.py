"""Files that interruptions leave whole."""

import multiprocessing
import os
import signal
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import durable
from trim_plugin.durable import append_lines, draft_of, open_regular, whole_lines, write_whole


def test_a_file_is_replaced_whole_and_no_draft_is_left(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "zwölf")
    assert [(path.name, path.read_text("utf-8")) for path in tmp_path.iterdir()] == [("a.txt", "zwölf")]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "a.txt", "one")

    def interrupted():
        with draft_of(tmp_path / "a.txt") as draft:
            draft.write_text("tw")
            assert (tmp_path / "a.txt").read_text() == "one"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "one")]


def test_others_may_read_it_as_they_may_read_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


@given(lines=st.lists(st.binary().filter(lambda line: b"\n" not in line and line.strip())), cut=st.integers(0))
def test_cut_off_anywhere_whole_lines_are_found(tmp_path_factory, lines, cut: int):
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    append_lines(file, lines[:1])
    append_lines(file, lines[1:])
    data = file.read_bytes()
    assert whole_lines(data) == (lines, len(data))
    data = data[: cut % (len(data) + 1)]
    whole, end = whole_lines(data)
    assert whole == lines[: data.count(b"\n")]
    assert data[end:].count(b"\n") == 0


def test_a_pipe_that_takes_a_files_place_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a")
    (tmp_path / "file").touch()
    looked_at_before = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda path: looked_at_before)
    with pytest.raises(ValueError, match="it is a named pipe, not a file"):
        open_regular(tmp_path / "a")


def write_for_ever(file, ready):
    while True:
        with draft_of(file) as draft:
            draft.write_bytes(b"old" * 100_000)
            ready.set()
            time.sleep(0.001)


def killed_writer(file):
    """Run a process that writes a file again and again, and kill it in the middle."""
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    writer = forked.Process(target=write_for_ever, args=(file, ready))
    writer.start()
    assert ready.wait(60)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()


def test_what_killed_writers_leave_is_removed_by_the_next_one(tmp_path):
    file = tmp_path / "a.txt"
    left = []
    for name in ("a.txt", "b.txt"):
        for _ in range(10):
            killed_writer(tmp_path / name)
            left.append(len([path for path in tmp_path.iterdir() if path.suffix == ".draft"]))
    assert max(left) > 0, "some were killed in the middle"
    assert max(left) <= 1, "each writer removes what the one before has left"
    (tmp_path / ".a.txt.draft").touch()  # the user's own
    write_whole(file, "new")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "b.txt") == [".a.txt.draft", "a.txt"]
    assert file.read_text() == "new"


def test_drafts_that_are_being_written_stay(tmp_path):
    with draft_of(tmp_path / "a.txt") as one, draft_of(tmp_path / ("ü" * 100)) as other:
        one.write_text("one")
        write_whole(tmp_path / "b.txt", "three")
        other.write_text("two")
    assert [(tmp_path / name).read_text() for name in ("a.txt", "ü" * 100, "b.txt")] == ["one", "two", "three"]
    assert len(list(tmp_path.iterdir())) == 3


def test_drafts_of_another_machine_stay_for_a_day(tmp_path):
    draft = tmp_path / ".a.txt.abcdefgh.0123abcd.draft"
    draft.touch()
    write_whole(tmp_path / "b.txt", "")
    assert draft.exists()
    os.utime(draft, (time.time() - 90_000, time.time() - 90_000))
    write_whole(tmp_path / "b.txt", "")
    assert not draft.exists()


def test_a_draft_that_was_taken_for_abandoned_is_made_again(tmp_path, monkeypatch):
    """Between making a draft and locking it, another process may come by."""
    lock, taken = durable._lock, []

    def come_by(descriptor, *, wait):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(durable, "_lock", come_by)
    write_whole(tmp_path / "a.txt", "all")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "all")]


def test_nothing_but_a_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(OSError, match="not a file"):
            write_whole(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 3
