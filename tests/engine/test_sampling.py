"""The next token by a request's own settings equals transformers', and text never takes back what was sent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.embedded import load_small_model
from trim_plugin.engine.request import Sampling
from trim_plugin.engine.sampling import Drawer, Writer, choose


@pytest.fixture(scope="module")
def tokenizer():
    return load_small_model()[1].tokenizer


@given(st.lists(st.sampled_from([{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 3}]), min_size=1, max_size=6))
def test_rows_do_not_depend_on_their_neighbours(kinds):
    logits = torch.randn(len(kinds), 20, generator=torch.Generator().manual_seed(0))

    def drawers():
        return [Drawer(Sampling(**kind, seed=number), [1]) for number, kind in enumerate(kinds)]

    together = choose(drawers(), logits)
    assert together == [choose([own], logits[row : row + 1])[0] for row, own in enumerate(drawers())]


def test_top_k_of_one_and_a_low_top_p_take_the_likeliest():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    for settings in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}):
        drawn = choose([Drawer(Sampling(temperature=1.0, **settings), [])], logits)
        assert drawn == [int(logits.argmax())]


def test_penalties_are_of_what_was_written():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    for settings in ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}):
        drawer = Drawer(Sampling(**settings), [])
        assert [choose([drawer], logits)[0] for _ in range(2)] == [0, 1]
    twice, once = Drawer(Sampling(frequency_penalty=0.5), []), Drawer(Sampling(presence_penalty=0.5), [])
    steps = torch.tensor([[2.0, 0.9, 0.0]])
    assert [choose([twice], steps)[0] for _ in range(4)] == [0, 0, 0, 1]  # 2.0, 1.5, 1.0, 0.5
    assert [choose([once], steps)[0] for _ in range(4)] == [0, 0, 0, 0]  # 2.0, then 1.5 for good
    of_the_prompt = Drawer(Sampling(repetition_penalty=1.5), [0, 99])  # 99 has no logit, as the image token
    assert choose([of_the_prompt], logits) == [1]
    assert choose([Drawer(Sampling(presence_penalty=0.5), [0])], logits) == [0]


@given(st.data())
def test_text_is_sent_once_and_whole(data):
    tokenizer = load_small_model()[1].tokenizer
    ids = data.draw(st.lists(st.integers(4, len(tokenizer) - 1), max_size=12))
    writer = Writer(tokenizer)
    pieces = [writer.add(token) for token in ids] + [writer.end()]
    assert "".join(pieces) == writer.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("stop", "sent"), [(("blue",), "red "), (("d b",), "re"), (("blueish",), "red blue"), (("r",), "")]
)
def test_nothing_of_a_stop_text_is_sent(tokenizer, stop, sent):
    ids = tokenizer("red blue", add_special_tokens=False)["input_ids"]
    writer, pieces = Writer(tokenizer, stop), []
    for token in ids:
        pieces.append(writer.add(token))
        if writer.stopped:
            break
    pieces.append(writer.end())
    assert "".join(pieces) == writer.text == sent
    assert writer.stopped is (sent != "red blue")
