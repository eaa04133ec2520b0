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

from trim_plugin.cli import main
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
    words = ["batch", "--questions", str(folder / "questions.jsonl"), "--out", str(out), "--batch-size", "8"]
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


def test_killed_three_times_every_row_is_answered_once_and_as_alone(tmp_path):
    good = scene_rows(tmp_path, 300)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:-100])
    broken = [{"images": ["half.png"], "question": "?"}, {"images": ["gone.png"], "question": "?"}, {"question": ""}]
    broken += ["not json", '["a list"]', {"images": ["0.png"]}, {"pictures": [], "question": "?"}]
    broken += [{"images": 7, "question": "?"}, {"messages": []}, {"question": "long " * 900}]
    rows = list(good)
    for place, row in enumerate(broken):
        rows.insert(29 * place + 3, row)
    write(tmp_path, rows)
    chance = random.Random(0)
    for kill in range(3):
        process, out = start(tmp_path)
        target = (kill + chance.random()) * 70
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.read_bytes().count(b"\n") > target:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    with out.open("a") as file:
        file.write('{"id": "row 299", "answer": "se')  # killed while it wrote
    process, out = start(tmp_path)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "310 rows have a result" in said
    lines = out.read_text().splitlines()
    results = read(out)
    assert len(lines) == len(results) == 310
    failed = {name for name, result in results.items() if "error" in result}
    assert failed == {str(29 * place + 4) for place in range(10)}
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


def test_the_second_time_nothing_is_left_to_do(tmp_path, capsys, monkeypatch):
    write(tmp_path, scene_rows(tmp_path, 3))
    words, out = command(tmp_path)
    assert main(words) == 0
    before = out.read_bytes()
    monkeypatch.setattr("trim_plugin.commands.batch.load_model", lambda arguments: pytest.fail("loads a model"))
    assert main(words) == 0
    assert out.read_bytes() == before
    assert "3 of them before" in capsys.readouterr().err


def test_errors_are_results_unless_they_are_to_be_tried_again(tmp_path, capsys):
    rows = scene_rows(tmp_path, 2)
    (tmp_path / "1.png").rename(tmp_path / "later.png")
    write(tmp_path, rows)
    words, out = command(tmp_path)
    assert main(words) == 0
    assert "no such picture" in read(out)["row 1"]["error"]
    assert "row 1: no such picture" in capsys.readouterr().err
    (tmp_path / "later.png").rename(tmp_path / "1.png")
    assert main(words) == 0
    assert "error" in read(out)["row 1"]
    assert main([*words, "--retry-errors"]) == 0
    assert "answer" in read(out)["row 1"]
    assert len(out.read_text().splitlines()) == 2


def test_pictures_are_looked_for_beside_the_questions(tmp_path, monkeypatch):
    write(tmp_path, scene_rows(tmp_path, 1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    words, out = command(tmp_path)
    assert main(words) == 0
    assert "answer" in read(out)["row 0"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-k-ratio", "0.1", "--kept-share", "0.2"], "several rules are given"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--questions", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["small", "--model", "small"], "the model is given twice"),
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


def test_results_of_another_rule_are_refused(tmp_path, capsys):
    write(tmp_path, scene_rows(tmp_path, 1))
    words, out = command(tmp_path)
    assert main([*words, "--top-k-ratio", "0.25"]) == 0
    before = out.read_bytes()
    assert main([*words, "--kept-share", "0.1"]) == 2
    assert "holds the results of another run (rule was '0.25', now" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    write(tmp_path, scene_rows(tmp_path, 1))

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trim_plugin.commands.batch.load_model", interrupted)
    words, _ = command(tmp_path)
    assert main(words) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err


def test_pictures_are_kept_where_it_is_said(tmp_path):
    rows = scene_rows(tmp_path, 2)
    write(tmp_path, [*rows, {**rows[0], "id": "again", "question": "Read all digits."}])
    words, out = command(tmp_path, "--pictures-cache", str(tmp_path / "encoded"))
    assert main(words) == 0
    assert len(list((tmp_path / "encoded").glob("*.safetensors"))) == 2
    expected = one_by_one(rows, tmp_path)
    assert {name: read(out)[name]["answer"] for name in expected} == expected
