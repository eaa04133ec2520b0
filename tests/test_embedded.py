from pathlib import Path

import torch

from trim_plugin.embedded import SMALL_MODEL, ask, examples, load_small_model


def test_the_shipped_model_is_small_and_safe():
    files = list(Path(SMALL_MODEL).iterdir())
    assert sum(path.stat().st_size for path in files) < 10 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}


def test_every_example_is_a_picture_with_a_question_and_its_answer():
    found = examples()
    assert len(found) == len({example.picture for example in found}) >= 5
    assert all(example.picture.exists() and example.question and example.answer for example in found)


def test_asking_takes_the_first_example_where_nothing_is_given():
    _, processor = load_small_model()
    first = examples()[0]
    default, given = ask(processor), ask(processor, first.question, first.picture)
    assert all(torch.equal(default[name], given[name]) for name in given)
    other = ask(processor, picture=examples()[1].picture)
    assert other["pixel_values"].shape[1:3] == default["pixel_values"].shape[1:3]
    assert not torch.equal(other["pixel_values"], default["pixel_values"])
