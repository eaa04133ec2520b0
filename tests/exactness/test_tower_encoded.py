"""Pictures that were encoded with `tower_share`: in a prompt, in files, remembered, and in an evaluation."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from trim_plugin import KCenter, Pictures, TrimmedCache, encode_pictures, open_picture
from trim_plugin.embedded import ask, examples
from trim_plugin.evaluation import AnswerLog, Question, evaluate, variants_for
from trim_plugin.forward import tower_merging
from trim_plugin.forward.tower_merging import merge_alike
from trim_plugin.pictures.recent import RecentPictures

from ..random_models import generate, largest_difference, largest_logit, trimmed

SHARE = 0.5


@pytest.mark.parametrize("config", [{"top_k_ratio": 1.0}, {"top_k_ratio": 0.15}], ids=str)
def test_encoded_pictures_answer_as_pictures_in_the_prompt_do(small, config):
    model, processor = small
    example = examples()[0]
    direct = trimmed(model, ask(processor), {**config, "tower_share": SHARE}, new=4)
    pictures = encode_pictures(model, processor, [example.picture], tower_share=SHARE)
    cache = TrimmedCache(model, config, pictures=pictures)
    known = generate(model, pictures.inputs(processor, example.question), new=4, cache=cache)
    assert torch.equal(direct.sequences, known.sequences)
    assert largest_difference(direct, known) <= 1e-5 * largest_logit(direct)
    untouched = trimmed(model, ask(processor), config, new=1)
    assert largest_difference(untouched, trimmed(model, ask(processor), {**config, "tower_share": SHARE}, new=1)) > 1e-4


def test_files_of_encoded_pictures_say_what_share(small, tmp_path):
    model, processor = small
    file, picture = tmp_path / "page.safetensors", examples()[0].picture
    merged = encode_pictures(model, processor, [picture], KCenter(0.25), tower_share=SHARE)
    merged.save(file)
    assert Pictures.load(file).tower_share == SHARE
    whole = encode_pictures(model, processor, [picture], tower_share=1.0)
    assert whole.tower_share is None
    assert (whole + merged).tower_share == (merged + whole).tower_share == SHARE


def test_pictures_remembered_with_one_share_are_not_taken_for_another(small, tmp_path):
    model, processor = small
    page = [open_picture(examples()[0].picture)]
    recent = RecentPictures(model, processor)
    assert [recent(page, share).tower_share for share in (None, SHARE, None)] == [None, SHARE, None]
    assert recent.encoded == 2
    for encoded in (2, 0):
        stored = RecentPictures(model, processor, folder=tmp_path)
        assert [stored(page, share).tower_share for share in (None, SHARE)] == [None, SHARE]
        assert stored.encoded == encoded
    assert len(list(tmp_path.iterdir())) == 2


def test_encoding_refuses_a_wrong_share(small):
    with pytest.raises(ValueError, match=r"tower_share must be a number in \(0, 1\], got 2"):
        encode_pictures(*small, [examples()[0].picture], tower_share=2)


def test_the_evaluation_encodes_with_each_ways_own_share(small, tmp_path):
    model, processor = small
    example = examples()[0]
    questions = [Question(name, (example.picture,), example.question, (example.answer,)) for name in "ab"]
    log = AnswerLog(tmp_path, {})
    seen = []
    with mock.patch.object(
        tower_merging, "merge_alike", side_effect=lambda *given: seen.append(1) or merge_alike(*given)
    ):
        evaluate(model, processor, questions, variants_for([1.0], stock=False), log, max_new_tokens=2)
        assert seen == []
        evaluate(
            model, processor, questions, variants_for([1.0], tower_share=SHARE, stock=False), log, max_new_tokens=2
        )
    assert seen
    assert {answer.way for answer in log.answers()} == {"exact", "nothing dropped, tower 0.5"}
