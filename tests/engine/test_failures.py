"""Failures between the forwards: while requests join and leave, draw, and hand on what they have. None ends the engine."""

from __future__ import annotations

import pytest
import torch

from trim_plugin import Engine, TrimConfig
from trim_plugin.cache.held import HeldCache
from trim_plugin.embedded import examples
from trim_plugin.engine import sampling
from trim_plugin.engine.running import RunningBatch
from trim_plugin.pictures.prompting import open_picture

CONFIG = TrimConfig(top_k_ratio=0.3)
PICTURES = [open_picture(example.picture) for example in examples()[:4]]
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("broken"), SystemExit(3), KeyboardInterrupt()]


@pytest.fixture(scope="module")
def expected(small):
    """Tokens of ten requests, each alone."""
    with Engine(*small, CONFIG, max_running=1) as engine:
        return [request.result(timeout=60).tokens for request in submitted(engine)]


def submitted(engine):
    """Greedy and drawn, texts alone and about pictures, of unequal lengths."""
    return [
        engine.submit(
            "Read all digits.",
            images=PICTURES[place : place + 1],
            max_new_tokens=3 + 2 * place,
            temperature=0.0 if place % 2 else 1.3,
            seed=place,
        )
        for place in range(10)
    ]


def breaking(monkeypatch, owner, name, error, after, times):
    """Some calls of a function fail when it has done its work, so that half of something larger is done."""
    original, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        found = original(*args, **kwargs)
        if after < len(calls) <= after + times:
            raise error
        return found

    monkeypatch.setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (HeldCache, "regroup", 1),
        (HeldCache, "batch_select_indices", 0),
        (RunningBatch, "join", 1),
        (RunningBatch, "leave", 0),
    ],
)
def test_who_joins_and_leaves_badly_starts_over(small, expected, monkeypatch, owner, name, after, error):
    calls = breaking(monkeypatch, owner, name, error, after, times=1)
    with Engine(*small, CONFIG, max_running=8) as engine:
        requests = submitted(engine)
        texts = ["".join(request) for request in requests]
        answers = [request.result(timeout=60) for request in requests]
        assert engine.healthy
        assert engine.stats()["read_again"] > 0
        assert engine.stats().get("failed", 0) == 0
    assert len(calls) > after
    assert [answer.tokens for answer in answers] == expected
    assert texts == [answer.text for answer in answers]  # nothing is sent twice


def test_what_always_breaks_ends_in_an_error(small, expected, monkeypatch):
    with monkeypatch.context() as patch:
        breaking(patch, RunningBatch, "join", RuntimeError("never"), 0, times=10**9)
        with Engine(*small, CONFIG) as engine:
            for request in submitted(engine):
                with pytest.raises(RuntimeError, match="never"):
                    request.result(timeout=60)
            assert engine.healthy
            patch.undo()
            assert [request.result(timeout=60).tokens for request in submitted(engine)] == expected


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_drawing_that_fails_for_one_ends_nobody_else(small, expected, monkeypatch, error):
    original = sampling.Drawer.draw

    def broken(self, probabilities):
        if self.sampling.seed == 4:
            raise error
        return original(self, probabilities)

    monkeypatch.setattr(sampling.Drawer, "draw", broken)
    with Engine(*small, CONFIG) as engine:
        for place, request in enumerate(submitted(engine)):
            if place == 4:
                with pytest.raises(type(error)):
                    request.result(timeout=60)
            else:
                assert request.result(timeout=60).tokens == expected[place]


def test_logits_that_are_no_numbers_are_an_error_of_who_draws(small, expected):
    """A temperature so small that everything overflows: nothing can be drawn."""
    with Engine(*small, CONFIG) as engine:
        cold = engine.submit("Read all digits.", temperature=1e-45, max_new_tokens=4)
        others = submitted(engine)
        with pytest.raises(RuntimeError):
            cold.result(timeout=60)
        assert [request.result(timeout=60).tokens for request in others] == expected


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_a_listener_that_raises_ends_its_own_request(small, expected, error):
    def listener(piece):
        raise error

    with Engine(*small, CONFIG) as engine:
        bad = engine.submit("Read all digits.", images=PICTURES[:1], max_new_tokens=100, listener=listener)
        others = submitted(engine)
        with pytest.raises(type(error)):
            bad.result(timeout=60)
        assert [request.result(timeout=60).tokens for request in others] == expected
        assert engine.healthy


def test_who_cannot_be_read_holds_up_neither_those_behind_nor_the_engine(small, monkeypatch):
    """Its prompt fails, first among others and then alone, while somebody has a long answer."""
    monkeypatch.setattr(small[0].generation_config, "eos_token_id", None)
    seven, reads = small[1].tokenizer.convert_tokens_to_ids("seven"), []

    def picky(_, args):
        if args[0].shape[1] > 1:
            reads.append(len(args[0]))
            if args[0].eq(seven).any():
                raise KeyError("odd")

    handle = small[0].get_input_embeddings().register_forward_pre_hook(picky)
    try:
        with Engine(*small, CONFIG, max_running=8) as engine:
            long = engine.submit("Read all digits.", images=PICTURES[:1], max_new_tokens=450)
            next(iter(long))
            bad = [engine.submit("Where is the seven?", images=PICTURES[:1]) for _ in range(3)]
            good = engine.submit("How many digits?", images=PICTURES[:1], max_new_tokens=2)
            for request in bad:
                with pytest.raises(KeyError):
                    request.result(timeout=60)
            assert good.result(timeout=60).tokens
            assert not long.done
            long.cancel()
    finally:
        handle.remove()
    assert len(reads) < 12
