"""`trim-plugin batch`: every row once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from trim_plugin.batching.worker import RowsFail
from trim_plugin.cli import main
from trim_plugin.commands import FAILED_ROWS
from trim_plugin.embedded import load_small_model
from trim_plugin.pictures.prompting import build_inputs, open_picture

from ..scenes import scene_rows


def write(folder, rows):
    file = folder / "questions.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def read(file):
    return {result["id"]: result for result in map(json.loads, file.read_text().splitlines())}


def command(folder, *options):
    out = folder / "answers.jsonl"
    words = ["batch", "--questions", str(folder / "questions.jsonl"), "--out", str(out), "--max-running", "8"]
    return [*words, "--max-new-tokens", "24", "--device", "cpu", *options], out


def start(folder, *options, **environment):
    words, out = command(folder, *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "trim_plugin.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, out


def one_by_one(rows, folder):
    model, processor = load_small_model()
    answers = {}
    for row in rows:
        inputs = build_inputs(processor, row["question"], [open_picture(folder / name) for name in row["images"]])
        output = model.generate(**inputs, cache_implementation="trimmed", max_new_tokens=24)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers[row["id"]] = processor.decode(new, skip_special_tokens=True).strip()
    return answers


@pytest.mark.parametrize(("kills", "count"), [(2, 60), pytest.param(25, 300, marks=pytest.mark.slow)])
def test_killed_again_and_again_every_row_is_answered_once_and_as_alone(tmp_path, kills, count):
    good, apart = scene_rows(tmp_path, count), count // 10 - 1
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:-100])
    broken = [{"images": ["half.png"], "question": "?"}, {"images": ["gone.png"], "question": "?"}, {"question": ""}]
    broken += ["not json", '["a list"]', {"images": ["0.png"]}, {"pictures": [], "question": "?"}]
    broken += [{"images": 7, "question": "?"}, {"messages": []}, {"question": "long " * 900}]
    rows = list(good)
    for place, row in enumerate(broken):
        rows.insert(apart * place + 3, row)
    write(tmp_path, rows)
    chance = random.Random(0)
    for kill in range(kills):
        process, out = start(tmp_path)
        target = (kill + chance.random()) * 0.7 * count / kills
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.read_bytes().count(b"\n") > target:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    with out.open("a") as file:
        file.write('{"id": "row 59", "answer": "se')  # killed while it wrote
    process, out = start(tmp_path)
    _, said = process.communicate(timeout=300)
    assert process.returncode == FAILED_ROWS, said
    assert f"{count + 10} rows have a result" in said
    assert said.splitlines()[-1].startswith(f"trim-plugin batch: 10 of {count + 10} rows are errors. ")
    assert "--retry-errors" in said.splitlines()[-1]
    lines = out.read_text().splitlines()
    results = read(out)
    assert len(lines) == len(results) == count + 10
    failed = {name for name, result in results.items() if "error" in result}
    assert failed == {str(apart * place + 4) for place in range(10)}
    expected = one_by_one(good, tmp_path)
    assert {name: results[name]["answer"] for name in expected} == expected


def test_processes_share_the_rows_and_the_file(tmp_path):
    rows = scene_rows(tmp_path, 24)
    write(tmp_path, rows)
    both = [start(tmp_path, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    for process, _ in both:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    results = [json.loads(line) for line in both[0][1].read_text().splitlines()]
    assert sorted(result["id"] for result in results) == sorted(row["id"] for row in rows)
    assert {result["id"]: result["answer"] for result in results} == one_by_one(rows, tmp_path)


def test_the_last_process_to_end_says_that_rows_failed(tmp_path, monkeypatch):
    """Launchers end the other processes when one of them fails."""
    write(tmp_path, [*scene_rows(tmp_path, 2), {"id": "broken", "images": ["gone.png"], "question": "?"}])
    words, _ = command(tmp_path)
    for rank, status in ((0, 0), (1, FAILED_ROWS), (0, FAILED_ROWS)):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        assert main(words) == status


def test_answers_stay_with_what_was_asked_when_the_file_is_edited(tmp_path, capsys):
    rows = [{name: row[name] for name in ("images", "question")} for row in scene_rows(tmp_path, 5)]
    named = {**rows[3], "id": "mine"}
    words, out = command(tmp_path)
    write(tmp_path, [*rows[:2], named])
    assert main(words) == 0
    before = read(out)
    write(tmp_path, [rows[4], *rows[:2], {**named, "question": "How many digits are there?"}])
    assert main(words) == 0
    assert (
        "1 results are of rows that are not in the file any more, or have changed: "
        in capsys.readouterr().err.replace("\n", "")
    )
    after = read(out)
    assert len(out.read_text().splitlines()) == 4
    assert [after[name]["answer"] for name in "23"] == [before[name]["answer"] for name in "12"]
    asked = [{**rows[4], "id": "1"}, {**named, "question": "How many digits are there?"}]
    assert {row["id"]: after[row["id"]]["answer"] for row in asked} == one_by_one(asked, tmp_path)


@pytest.mark.parametrize("link", ["the same", "symlink_to", "hardlink_to"])
def test_out_is_the_questions(tmp_path, capsys, link):
    file = write(tmp_path, scene_rows(tmp_path, 1))
    before, out = file.read_bytes(), file
    if link != "the same":
        out = tmp_path / "link.jsonl"
        getattr(out, link)(file)
    words, _ = command(tmp_path)
    assert main([*words, "--out", str(out)]) == 2
    assert "is the file of questions; results need a file of their own" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("*.settings.json"))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "is a folder, a pipe or a device"),
        ("/dev/full", "is a folder, a pipe or a device"),
        ("nowhere/out.jsonl", "no such folder"),
        ("0.png/out.jsonl", "no such folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_out_cannot_be_written(tmp_path, capsys, monkeypatch, out, said):
    write(tmp_path, scene_rows(tmp_path, 1))
    monkeypatch.chdir(tmp_path)
    words, _ = command(tmp_path)
    assert main([*words, "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trim-plugin batch: ")
    assert said in line


def test_a_disk_that_gets_full(tmp_path):
    write(tmp_path, scene_rows(tmp_path, 40))
    words, out = command(tmp_path)
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)); "
    limited += "sys.argv[0] = 'trim-plugin'; runpy.run_module('trim_plugin.cli', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"trim-plugin batch: cannot write {out}: ")
    lines = out.read_text().splitlines()
    assert 0 < len(lines) < 40
    assert main(words) == 0
    assert out.read_text().splitlines()[: len(lines)] == lines
    assert len(read(out)) == 40


def test_the_second_time_nothing_is_left_to_do(tmp_path, capsys, monkeypatch):
    write(tmp_path, scene_rows(tmp_path, 3))
    words, out = command(tmp_path)
    assert main(words) == 0
    before = out.read_bytes()
    monkeypatch.setattr("trim_plugin.commands.loading.load_model", lambda arguments: pytest.fail("loads a model"))
    assert main(words) == 0
    assert out.read_bytes() == before
    assert "3 of them before" in capsys.readouterr().err


def test_rows_that_failed(tmp_path, capsys):
    rows = scene_rows(tmp_path, 2)
    (tmp_path / "1.png").rename(tmp_path / "later.png")
    write(tmp_path, rows)
    words, out = command(tmp_path)
    assert main(words) == FAILED_ROWS
    assert "no such picture" in read(out)["row 1"]["error"]
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith("row 1: no such picture")
    assert said[-1].startswith("trim-plugin batch: 1 of 2 rows are errors. ")
    assert "--retry-errors" in said[-1]
    (tmp_path / "later.png").rename(tmp_path / "1.png")
    assert main(words) == FAILED_ROWS
    assert "error" in read(out)["row 1"]
    assert main([*words, "--retry-errors"]) == 0
    assert "answer" in read(out)["row 1"]
    assert len(out.read_text().splitlines()) == 2


def test_what_fails_every_row_stops_the_run_and_costs_no_result(tmp_path, monkeypatch):
    """A mistake in code: a run of thousands shall not go on to fail of it row by row."""
    rows = scene_rows(tmp_path, 60)
    write(tmp_path, rows)
    words, out = command(tmp_path)
    loaded = load_small_model()

    def fail(*args):
        raise AttributeError("odd")

    monkeypatch.setattr("trim_plugin.commands.loading.load_model", lambda arguments: loaded)
    handle = loaded[0].get_input_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(RowsFail, match="AttributeError: odd"):
            main(words)
    finally:
        handle.remove()
    failed = read(out)
    assert 16 <= len(failed) < 60
    assert {result["error"] for result in failed.values()} == {"AttributeError: odd"}
    assert main(words) == FAILED_ROWS  # goes on
    assert len(read(out)) == 60
    assert main([*words, "--retry-errors"]) == 0
    assert {name: result["answer"] for name, result in read(out).items()} == one_by_one(rows, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-k-ratio", "0.1", "--kept-share", "0.2"], "several rules are given"),
        (["--max-running", "0"], "--max-running must be at least 1"),
        (["--memory", "8"], "--memory needs a unit: 8GiB"),
        (["--questions", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
    ],
)
def test_what_the_user_can_mend(tmp_path, capsys, options, said):
    write(tmp_path, scene_rows(tmp_path, 1))
    words, out = command(tmp_path, *options)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_pictures_cache_with_ray(tmp_path, capsys):
    write(tmp_path, scene_rows(tmp_path, 1))
    words, out = command(tmp_path, "--engine", "ray", "--pictures-cache", str(tmp_path / "encoded"))
    assert main(words) == 2
    assert "--pictures-cache goes with --engine local" in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "encoded").exists()


def test_pictures_cache_no_folder(tmp_path, capsys):
    write(tmp_path, scene_rows(tmp_path, 1))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "encoded"):
        words, out = command(tmp_path, "--pictures-cache", str(place))
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"trim-plugin batch: --pictures-cache {place}: cannot make this folder")
        assert not out.exists()


def test_results_of_another_rule_are_refused(tmp_path, capsys):
    write(tmp_path, scene_rows(tmp_path, 1))
    words, out = command(tmp_path)
    assert main([*words, "--top-k-ratio", "0.25"]) == 0
    before = out.read_bytes()
    assert main([*words, "--kept-share", "0.1"]) == 2
    assert "holds the results of another run (rule was '0.25', now" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_pictures_are_kept_where_it_is_said(tmp_path):
    rows = scene_rows(tmp_path, 2)
    write(tmp_path, [*rows, {**rows[0], "id": "again", "question": "Read all digits."}])
    words, out = command(tmp_path, "--pictures-cache", str(tmp_path / "encoded"))
    assert main(words) == 0
    assert len(list((tmp_path / "encoded").glob("*.safetensors"))) == 2
    expected = one_by_one(rows, tmp_path)
    assert {name: read(out)[name]["answer"] for name in expected} == expected
