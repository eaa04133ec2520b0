"""What a user writes is shown as it is written: no name, question or answer is read as colours, links or emoji."""

from __future__ import annotations

import json

import pytest

from trim_plugin.cli import main
from trim_plugin.embedded import examples

from ..random_models import random_config

#: rich's markup: a style, an end of nothing (an error), and an emoji.
NAMES = ["[red]", "[bold", "x]", ":warning:"]


def shown(capsys):
    """All that a command said, without its line breaks."""
    printed = capsys.readouterr()
    return (printed.out + printed.err).replace("\n", "")


@pytest.mark.parametrize("name", [*NAMES, "[/x]"])
def test_eval_names_its_folder_as_it_is_written(data, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    command = ["eval", "--data", str(data), "--out", name, "--max-new-tokens", "2", "--top-k-ratio", "0.5", "--limit"]
    assert main([*command, "1"]) == 0
    assert f"report.html: {name}" in shown(capsys)


def test_eval_names_the_variants_of_a_log_as_they_are_written(data, tmp_path, capsys):
    """Those of `evaluate`, whose names are its caller's."""
    command = ["eval", "--data", str(data), "--out", str(tmp_path), "--max-new-tokens", "2", "--limit", "1"]
    command += ["--top-k-ratio", "0.5", "--no-stock"]
    assert main(command) == 0
    capsys.readouterr()
    file = tmp_path / "answers-0.jsonl"
    answer = json.loads(file.read_text())
    file.write_text("".join(json.dumps(answer | {"way": name}) + "\n" for name in ["[/mine]", *NAMES]))
    assert main(command) == 0
    said = shown(capsys)
    assert "overlap with [/mine];" in said
    assert all(said.count(name) == 1 for name in NAMES)


@pytest.mark.parametrize("name", [*NAMES, "[/x]"])
def test_demo_asks_as_it_is_written(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where the question is shown while it is answered
    command = ["demo", "--image", str(examples()[0].picture), "--prompt", f"How {name}", "--max-new-tokens", "1"]
    file = name.replace("/", "") + ".png"
    assert main([*command, "--out", file]) == 0
    said = shown(capsys)
    assert f"answering How {name}" in said
    assert f"drawn in {file}" in said
    assert f"How {name}" in said.split("question", 1)[1]  # in the table


def test_demo_draws_a_question_about_dollars(tmp_path):
    """Two of them are mathematics to matplotlib."""
    command = ["demo", "--image", str(examples()[0].picture), "--max-new-tokens", "1"]
    assert main([*command, "--prompt", r"Is it $5 \frac$?", "--out", str(tmp_path / "kept.png")]) == 0


@pytest.mark.parametrize("name", [*NAMES, "[/x]"])
def test_plan_names_its_model_as_it_is_written(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    random_config().save_pretrained(tmp_path / name)
    assert main(["plan", name]) == 0
    assert f"{name}, batch 1" in shown(capsys)


def test_encode_and_batch_name_files_as_they_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = examples()[0].picture.read_bytes()
    for name in NAMES:
        (tmp_path / f"{name}.png").write_bytes(picture)
        assert main(["encode", "--image", f"{name}.png", "--out", f"{name}.safetensors"]) == 0
        said = shown(capsys)
        assert f"{name}.png: " in said
        assert f"{name}.safetensors: " in said
        row = {"id": name, "images": [f"{name}.jpg"], "question": "?"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        assert main(["batch", "--questions", "rows.jsonl", "--out", f"{name}.jsonl"]) == 1
        said = shown(capsys)
        assert f"1 are errors: {name}.jsonl" in said
        assert f"{name}: no such picture: {name}.jpg" in said
