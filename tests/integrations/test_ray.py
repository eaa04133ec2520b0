"""A Ray cluster of two actors gives the worker's own answers, in whatever goes in and out, and whatever dies on the way."""

from __future__ import annotations

import json
import shutil
import time
import warnings

import psutil
import pytest

from trim_plugin.batching.worker import Worker
from trim_plugin.cli import main
from trim_plugin.embedded import SMALL_MODEL, load_small_model

from ..scenes import scene_rows

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

SETTINGS = {"weights": "fp32", "device": "cpu", "config": {"top_k_ratio": 0.1}, "max_running": 8, "max_new_tokens": 24}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Four logical CPUs on whatever there is."""
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    rows = scene_rows(folder, 40)
    worker = Worker(*load_small_model(), {"top_k_ratio": 0.1}, max_running=8, max_new_tokens=24, folder=folder)
    return folder, rows, {result["id"]: result["answer"] for result in worker(rows)}


def test_a_dataset_of_ones_own_through_two_actors(rows):
    from trim_plugin.integrations.ray import answer

    folder, asked, expected = rows
    broken = {"id": "broken", "images": ["gone.png"], "question": "?"}
    dataset = ray.data.from_items([{**row, "page": number} for number, row in enumerate([*asked, broken])])
    answered = answer(dataset, str(SMALL_MODEL), actors=2, num_cpus=0.5, rows=8, folder=folder, **SETTINGS).take_all()
    results = {row["id"]: row for row in answered}
    assert len(answered) == len(results) == 41
    assert {name: results[name]["answer"] for name in expected} == expected
    assert "no such picture" in results["broken"]["error"]
    assert results["broken"]["answer"] is None
    assert sorted(row["page"] for row in answered) == list(range(41))
    assert all(results[name]["kept"] > 0 for name in expected)


def test_parquet_with_pictures_inside_and_chats(rows, tmp_path):
    import pyarrow
    import pyarrow.parquet

    from trim_plugin.integrations.ray import answer

    folder, asked, expected = rows
    table = {
        "id": [row["id"] for row in asked[:9]],
        "images": [[(folder / row["images"][0]).read_bytes()] for row in asked[:9]],
        "messages": [[{"role": "user", "content": row["question"]}] for row in asked[:9]],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "questions.parquet")
    dataset = ray.data.read_parquet(str(tmp_path / "questions.parquet"))
    answer(dataset, str(SMALL_MODEL), num_cpus=0.5, **SETTINGS).write_parquet(str(tmp_path / "answers"))
    written = pyarrow.parquet.read_table(tmp_path / "answers").to_pylist()
    assert {row["id"]: row["answer"] for row in written} == {row["id"]: expected[row["id"]] for row in asked[:9]}


def test_an_actor_that_is_killed_midway(rows):
    from trim_plugin.asking.rows import Row
    from trim_plugin.integrations.ray import answer_rows

    folder, asked, expected = rows
    asked = [Row.of(row) for row in asked]
    answers: list[dict] = []
    killed = 0
    for batch in answer_rows(asked, str(SMALL_MODEL), actors=2, num_cpus=0.5, folder=folder, **SETTINGS):
        answers += batch
        if not killed:
            # The second may still be starting, those of an earlier test may still be ending.
            deadline, actors = time.monotonic() + 120, []
            while len(actors) != 2 and time.monotonic() < deadline:
                time.sleep(0.05)
                actors = [one for one in psutil.Process().children(recursive=True) if _is_actor(one)]
            assert len(actors) == 2
            actors[0].kill()
            killed = actors[0].pid
    assert killed
    assert len(answers) == 40
    assert {result["id"]: result["answer"] for result in answers} == expected


def test_settings_that_an_engine_cannot_have_are_refused_before_any_actor(rows):
    from trim_plugin.integrations.ray import answer

    dataset = ray.data.from_items(rows[1])
    with pytest.raises(ValueError, match="An Engine's batch grows and shrinks"):
        answer(dataset, str(SMALL_MODEL), config={"static": True})


def _is_actor(process):
    try:
        return any("JsonAnswerer" in word for word in process.cmdline())
    except psutil.Error:
        return False


def test_the_command_line_s_engine(rows, tmp_path):
    folder, asked, expected = rows
    questions, out = folder / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [*asked, {"id": "broken", "images": ["gone.png"], "question": "?"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in lines))
    words = ["batch", "--questions", str(questions), "--out", str(out), "--engine", "ray", "--actors", "2"]
    words += ["--max-running", "8", "--memory", "2GiB", "--max-new-tokens", "24"]
    words += ["--top-k-ratio", "0.1", "--device", "cpu"]
    out.write_text(json.dumps({"id": "row 0", "answer": "kept"}) + "\n")
    assert main(words) == 1  # a row is an error
    results = {result["id"]: result for result in map(json.loads, out.read_text().splitlines())}
    assert len(out.read_text().splitlines()) == 41
    assert results.pop("row 0") == {"id": "row 0", "answer": "kept"}
    assert "no such picture" in results.pop("broken")["error"]
    assert {name: result["answer"] for name, result in results.items()} == {
        name: answer for name, answer in expected.items() if name != "row 0"
    }


def test_what_no_engine_applies_is_said_here_where_the_actors_logs_are_not_seen(rows, tmp_path):
    from trim_plugin.integrations.ray import answer

    folder, asked, _ = rows
    model = shutil.copytree(SMALL_MODEL, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    dataset = ray.data.from_items(asked[:2])
    for path in (model, tmp_path / "elsewhere"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            answer(dataset, str(path), folder=folder, **SETTINGS)  # planned; nothing runs
        assert not [one for one in said if "does not apply" in str(one.message)]
    (model / "generation_config.json").write_text(json.dumps(settings | {"no_repeat_ngram_size": 2}))
    with pytest.warns(UserWarning, match="does not apply no_repeat_ngram_size=2"):
        answer(dataset, str(model), folder=folder, **SETTINGS)
