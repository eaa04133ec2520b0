"""The worker: the same answers as one by one, in the rows' order; what goes wrong stays in its row."""

from __future__ import annotations

import gc
import io

import pytest

from trim_plugin.asking.answers import Inputs, answer
from trim_plugin.batching.worker import Worker
from trim_plugin.config import TrimConfig
from trim_plugin.engine.engine import EngineClosed
from trim_plugin.pictures.prompting import open_picture, written

from ..scenes import scene_rows
from .conftest import without_seconds


def alone(small, row, folder):
    """The answer of one `generate` for one row, as a result without its time."""
    model, processor = small
    pictures = [open_picture(folder / name) for name in row["images"]]
    inputs = Inputs.of(processor, [written(processor, row["question"], len(pictures))], [pictures])
    (own,), _ = answer(model, processor, inputs, TrimConfig(top_k_ratio=0.1), 24)
    return {name: value for name, value in own.result().items() if name != "seconds"}


def test_same_answers_and_counts_as_one_by_one(worker, small, tmp_path):
    rows = scene_rows(tmp_path, 24)
    results = worker(rows)
    assert [result["id"] for result in results] == [row["id"] for row in rows]
    for row, result in zip(rows, results, strict=True):
        assert result.pop("seconds") > 0
        assert result == {"id": row["id"], **alone(small, row, tmp_path)}
        assert 0 < result["tokens"] <= 24


def test_rows_of_every_kind_in_one_call(worker, small, tmp_path):
    first, second = scene_rows(tmp_path, 2)
    names = [*first["images"], *second["images"]]
    picture = open_picture(tmp_path / names[0])
    data = io.BytesIO()
    picture.save(data, "PNG")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first["question"]}]}]
    rows = [
        {**first, "images": [picture]},
        {**first, "images": [data.getvalue()]},
        {"images": first["images"], "messages": chat},
        {"images": first["images"], "messages": [{"role": "user", "content": first["question"]}]},
        {"images": names, "question": first["question"]},
        {"question": first["question"]},
        {"images": first["images"], "question": first["question"], "max_new_tokens": 1},
    ]
    results = worker(rows)
    expected = alone(small, first, tmp_path)
    assert [result["answer"] for result in results[:4]] == [expected["answer"]] * 4
    assert without_seconds(results[4:6]) == [
        alone(small, {**first, "images": names}, tmp_path),
        alone(small, {**first, "images": []}, tmp_path),
    ]
    assert (results[5]["visible"], results[5]["kept"]) == (0, 0)
    assert results[6]["tokens"] == 1
    assert expected["answer"].startswith(results[6]["answer"])


def test_results_come_as_they_finish_and_no_more_is_read_than_is_needed_soon(small, tmp_path):
    rows = scene_rows(tmp_path, 40)
    rows[0] = {**rows[0], "question": "Read all digits.", "max_new_tokens": 24}
    rows[1:] = [{**row, "max_new_tokens": 1} for row in rows[1:]]

    class Watched(list):
        read = 0

        def __getitem__(self, place):
            self.read = max(self.read, place + 1)
            return super().__getitem__(place)

    watched, answered = Watched(rows), []
    own = Worker(*small, max_running=2, folder=tmp_path)
    for some in own.answers(watched):
        answered += [place for place, _ in some]
        assert watched.read - len(answered) <= 4
    own.close()
    assert sorted(answered) == list(range(40))
    assert answered[0] != 0


def test_who_stops_asking_leaves_nothing_running(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small[0].generation_config, "eos_token_id", None)  # no answer ends by itself
    own = Worker(*small, max_running=8, max_new_tokens=200, folder=tmp_path)
    rows = scene_rows(tmp_path, 12)
    rows[0]["max_new_tokens"] = 1
    answers = own.answers(rows)
    next(answers)
    answers.close()
    assert [result["id"] for result in own([{**row, "max_new_tokens": 2} for row in rows[:2]])] == ["row 0", "row 1"]
    own.engine.close()
    stats = own.engine.stats()
    assert stats["running"] == stats["waiting"] == 0
    assert stats["finished_cancelled"] == 11


def test_a_worker_that_is_closed_gives_no_half_answers(small, tmp_path):
    own = Worker(*small, max_running=2, max_new_tokens=24, folder=tmp_path)
    answers = own.answers(scene_rows(tmp_path, 12))
    next(answers)
    own.close()
    with pytest.raises(EngineClosed):
        list(answers)
    with pytest.raises(EngineClosed):
        own([{"question": "How many?"}])


def test_a_worker_that_nobody_holds_ends_its_thread(small):
    own = Worker(*small)
    engine = own.engine
    assert engine.healthy
    del own
    gc.collect()
    assert not engine.healthy


def test_pictures_in_a_folder_give_the_same_answers_and_are_encoded_once(small, worker, tmp_path):
    rows = scene_rows(tmp_path, 4)
    several = [
        {**row, "id": f"{row['id']} {asked}", "question": asked}
        for row in rows
        for asked in ("Read all digits.", "How many digits?")
    ]
    several += [{"images": [*rows[0]["images"], *rows[1]["images"]], "question": "Read all digits."}]
    several += [{"question": "How many?"}, {"images": ["gone.png"], "question": "?"}]
    expected = worker(several)
    for encoded in (4, 0):
        settings = {"max_new_tokens": 24, "folder": tmp_path, "picture_folder": tmp_path / "encoded"}
        own = Worker(*small, worker.config, **settings)
        assert without_seconds(own(several)) == without_seconds(expected)
        assert own.engine.stats()["pictures_encoded"] == encoded
        own.close()
    assert len(list((tmp_path / "encoded").iterdir())) == 4


def test_no_rows(worker):
    assert worker([]) == []


@pytest.mark.parametrize("settings", [{"max_running": 0}, {"max_new_tokens": True}, {"memory": 1.5}])
def test_worker_number_not_positive(small, settings):
    with pytest.raises(ValueError, match="must be a positive integer"):
        Worker(*small, **settings)


@pytest.mark.parametrize("config", [{"static": True, "max_cache_len": 64}, {"self_kv_quantization": "fp8"}])
def test_worker_settings_of_an_engine(small, config):
    with pytest.raises(ValueError, match="An Engine's batch grows and shrinks"):
        Worker(*small, config)
