"""Rounds of `KCenter` that may not ask the host whether they have chosen enough."""

from __future__ import annotations

import math

import pytest
import torch

from trim_plugin import KCenter
from trim_plugin.selection.k_center import make_all, short_ones
from trim_plugin.selection.rounds import Unread


def drawn(kind, tokens, seed, width=64):
    """States of one sample."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, width, generator=generator)
    if kind == "noise":
        return noise[None]
    places = torch.linspace(0, 6, tokens)[:, None]
    if kind == "curve":
        return (torch.sin(places * torch.rand(1, width, generator=generator) * 5) + 0.02 * noise)[None]
    states = torch.sin(places * 5 * torch.rand(1, width, generator=generator)) + 0.15 * noise
    if kind == "half blank":
        states[: tokens // 2] = states[0] + 0.01 * noise[: tokens // 2]
    return states[None]


def one_a_round(tokens, apart=140):
    """States that rounds cannot hurry through: each is nearer to the first one than the one before, and to no other."""
    angles = torch.full((tokens,), 0.0)
    angles[1 : apart + 1] = math.pi / 2 * 0.95 ** torch.arange(apart)
    states = torch.zeros(tokens, apart + 1)
    states[:, 0] = angles.cos()
    states[torch.arange(1, apart + 1), torch.arange(1, apart + 1)] = angles[1 : apart + 1].sin()
    return states[None]


@pytest.mark.parametrize("kind", ["noise", "smooth", "half blank"])
@pytest.mark.parametrize(("tokens", "kept_share"), [(1601, 0.35), (2600, 0.5), (3300, 0.1)])
def test_they_choose_what_rounds_choose_that_ask(kind, tokens, kept_share):
    states, members = drawn(kind, tokens, seed=tokens), torch.ones(1, tokens, dtype=torch.bool)
    unread = Unread(asks=0)
    chosen = KCenter(kept_share).choose(states, members, sizes=[[tokens]], unread=unread)
    assert torch.equal(chosen, KCenter(kept_share).choose(states, members))
    assert short_ones([unread]) == []


def test_too_few_rounds_are_told_and_choose_again_where_they_may_ask():
    tokens = 4000
    states, members = one_a_round(tokens), torch.ones(1, tokens, dtype=torch.bool)
    rule = KCenter(100 / tokens)
    wanted = rule.choose(states, members)
    assert int(wanted.sum()) == 100
    unread = Unread(asks=0)
    assert int(rule.choose(states, members, sizes=[[tokens]], unread=unread).sum()) < 100
    assert short_ones([Unread(), unread]) == [1]
    numbers: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def make_unasked(number, unread):
        if unread.asks is not None:
            unread.asks = 0
        own = states if number else drawn("noise", tokens, seed=1)
        numbers[number].append(rule.choose(own, members, sizes=[[tokens]], unread=unread))

    make_all(2, make_unasked)
    assert [len(numbers[number]) for number in range(2)] == [1, 2]
    assert torch.equal(numbers[1][-1], wanted)


def test_nan_is_told_behind_the_last_choice():
    states, members = drawn("noise", 3300, seed=0), torch.ones(1, 3300, dtype=torch.bool)
    states[0, 7, 3] = float("nan")
    for asks in (0, 4):
        made = []

        def make(number, unread, asks=asks, made=made):
            unread.asks = asks
            made.append(number)
            KCenter(0.2).choose(
                states if number == 1 else states[:, 8:],
                members[:, : states.shape[1] - 8 * (number != 1)],
                unread=unread,
            )

        with pytest.raises(ValueError, match="visual states are NaN"):
            make_all(3, make)
        assert made == ([0, 1, 2] if asks == 0 else [0, 1])


def test_they_ask_a_few_times_however_many_choices_there_are():
    asked = []
    make_all(20, lambda number, unread: (asked.append(unread.asks), setattr(unread, "asks", max(0, unread.asks - 1))))
    assert asked[0] > 0
    assert sum(asks > 0 for asks in asked) == asked[0]


def test_what_was_needed_before_is_needed_again():
    """Pages of a prompt are alike: none is read twice because rounds were too few."""
    members, made = torch.ones(1, 3300, dtype=torch.bool), []

    def make(number, unread):
        made.append(number)
        KCenter(0.25).choose(drawn("curve", 3300, seed=number), members, sizes=[[3300]], unread=unread)

    make_all(8, make)
    assert made == list(range(8))
    alone = Unread(asks=0)
    KCenter(0.25).choose(drawn("curve", 3300, seed=7), members, sizes=[[3300]], unread=alone)
    assert short_ones([alone]) == [0], "it needs more rounds than usual"
