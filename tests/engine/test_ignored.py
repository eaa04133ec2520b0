"""What a model asks of greedy `generate` and no engine does is said, once, when an engine is made."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings

import pytest
from transformers import GenerationConfig

from trim_plugin import Engine, TrimConfig
from trim_plugin.cli import main
from trim_plugin.embedded import SMALL_MODEL, examples
from trim_plugin.engine.ignored import ignored

EXAMPLE = examples()[0]


def answer(small):
    with Engine(*small, TrimConfig(top_k_ratio=1.0)) as engine:
        return engine.submit(EXAMPLE.question, images=[EXAMPLE.picture], max_new_tokens=8).result(timeout=60).tokens


@contextlib.contextmanager
def said():
    """What is said of settings that are not applied; libraries may warn of their own matters."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if "does not apply" in str(one.message)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.3),
        ("no_repeat_ngram_size", 2),
        ("bad_words_ids", [[5], [6, 7]]),
        ("min_new_tokens", 6),
        ("suppress_tokens", list(range(20, 80))),
        ("stop_strings", ["two"]),
    ],
)
def test_an_engine_says_what_it_does_not_apply_and_answers_without(small, monkeypatch, name, value):
    expected = answer(small)
    monkeypatch.setattr(small[0].generation_config, name, value)
    with said() as messages:
        assert answer(small) == expected
    (message,) = messages
    assert f" {name}=" in message
    assert len(message) < 400
    assert "\n" not in message


def test_several_are_named_together(small, monkeypatch):
    monkeypatch.setattr(small[0].generation_config, "no_repeat_ngram_size", 2)
    monkeypatch.setattr(small[0].generation_config, "min_length", 3)
    with said() as messages:
        answer(small)
    (message,) = messages
    assert "no_repeat_ngram_size=2, min_length=3 of" in message


def test_nothing_is_said_of_a_plain_model(small, monkeypatch):
    """Not of how a model would like to be drawn from, either: what is drawn is up to each request."""
    for name, value in {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0}.items():
        monkeypatch.setattr(small[0].generation_config, name, value)
    with said() as messages:
        answer(small)
    assert messages == []
    assert ignored(GenerationConfig()) == {}


def test_batch_says_it_when_it_begins(tmp_path, capsys):
    """In one line, however many rows there are."""
    model = shutil.copytree(SMALL_MODEL, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"no_repeat_ngram_size": 2}))
    rows = [{"images": [str(EXAMPLE.picture)], "question": EXAMPLE.question}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--questions", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "2"]
    assert main(["batch", str(model), "--weights", "fp32", *words]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no_repeat_ngram_size" in line]
    assert len(lines) == 1
    assert lines[0].startswith("trim-plugin batch: An Engine does not apply no_repeat_ngram_size=2 of the model's ")
