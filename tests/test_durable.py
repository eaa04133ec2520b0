"""Files that interruptions leave whole."""

import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import durable
from trim_plugin.durable import append_lines, check_settings, draft_of, whole_lines, write_whole


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


@given(entries=st.lists(st.dictionaries(st.text(), st.text(max_size=30), max_size=2)), cut=st.integers(0), more=...)
def test_cut_off_anywhere_whole_lines_stay_and_new_ones_follow(tmp_path_factory, entries, cut: int, more: bool):
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    append_lines(file, entries)
    data = file.read_bytes()
    data = data[: cut % (len(data) + 1)]
    file.write_bytes(data)
    stays = entries[: data.count(b"\n")]
    lines, end = whole_lines(data)
    assert [json.loads(line) for line in lines] == stays
    assert data[end:].count(b"\n") == 0
    append_lines(file, [{"new": "ü"}] if more else [])
    found = file.read_bytes()
    assert found.startswith(data[:end])
    assert [json.loads(line) for line in found.splitlines()] == stays + [{"new": "ü"}] * more


@pytest.mark.parametrize("torn", [1, durable.BLOCK - 1, durable.BLOCK, durable.BLOCK + 1, 3 * durable.BLOCK])
@pytest.mark.parametrize("before", [b"", b"{}\n"])
def test_what_was_cut_off_may_be_long(tmp_path, before, torn):
    file = tmp_path / "a.jsonl"
    file.write_bytes(before + b"x" * torn)
    append_lines(file, [{"new": 1}])
    assert file.read_bytes() == before + b'{"new": 1}\n'


@pytest.mark.parametrize("now", [{"model": "large"}, {}, {"model": "small", "limit": 1}])
def test_other_settings_are_another_run(tmp_path, now):
    file = tmp_path / "settings.json"
    write_whole(file, json.dumps({"model": "small"}))
    check_settings(file, {"model": "small", "adapter": None}, "x holds answers", "folder")
    with pytest.raises(
        ValueError, match=r"^x holds answers of another run \(.*Give another folder, or remove this one"
    ):
        check_settings(file, now, "x holds answers", "folder")
