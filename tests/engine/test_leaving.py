"""How requests leave an engine: done, cancelled, or because it closes."""

from __future__ import annotations

import threading
import time

import pytest

from trim_plugin import Engine, TrimConfig, TrimmedCache
from trim_plugin.embedded import examples
from trim_plugin.engine.engine import EngineClosed
from trim_plugin.engine.request import Request

PICTURES = [example.picture for example in examples()]
CONFIG = TrimConfig(top_k_ratio=0.3)


def test_closing_drains_and_later_requests_are_refused(small):
    engine = Engine(*small, CONFIG)
    requests = [engine.submit("Read all digits.", images=[PICTURES[0]], max_new_tokens=6) for _ in range(5)]
    engine.close()
    assert all(request.result(0).tokens for request in requests)
    with pytest.raises(EngineClosed, match="is closed"):
        engine.submit("How many?")
    assert not engine.healthy


def test_cancelling_ends_a_request_at_the_next_step(small):
    with Engine(*small, CONFIG) as engine:
        long = engine.submit("Read all digits.", images=[PICTURES[0]], max_new_tokens=300, temperature=2.0, seed=1)
        next(iter(long))
        long.cancel()
        assert long.result(timeout=20).finish_reason in ("cancelled", "stop")
        assert engine.submit("How many?", max_new_tokens=1).result().finish_reason in ("length", "stop")


def test_those_who_have_ended_leave_together(small, monkeypatch):
    """Letting one go copies what is held of all others."""
    copies, of_all = [], TrimmedCache.batch_select_indices
    monkeypatch.setattr(TrimmedCache, "batch_select_indices", lambda cache, own: copies.append(1) or of_all(cache, own))
    lengths, all_in = range(1, 17), threading.Event()
    handle = small[0].model.vision_model.register_forward_pre_hook(lambda *_: all_in.wait(60) and None)
    try:
        with Engine(*small, TrimConfig(top_k_ratio=1.0)) as engine:
            asked = [engine.submit("Read all digits.", images=PICTURES[4:5], max_new_tokens=new) for new in lengths]
            all_in.set()
            answers = [request.result(timeout=60) for request in asked]
    finally:
        handle.remove()
    longest = answers[-1].tokens
    assert [answer.tokens for answer in answers] == [longest[:new] for new in lengths]
    assert len(longest) > 12  # they end one after the other
    assert len(copies) <= 10


def test_closing_cancels_those_who_are_being_read(small, monkeypatch):
    model, processor = small
    monkeypatch.setattr(model.generation_config, "eos_token_id", -1)
    reading, go_on = threading.Event(), threading.Event()

    def wait(*_):
        reading.set()
        go_on.wait(20)

    handle = model.model.vision_model.register_forward_pre_hook(wait)
    try:
        engine = Engine(model, processor, CONFIG)
        request = engine.submit("How many?", images=PICTURES[:1], max_new_tokens=200)
        assert reading.wait(20)
        closing = threading.Thread(target=engine.close, kwargs={"cancel": True})
        closing.start()
        time.sleep(0.1)  # it waits for the engine's thread
        go_on.set()
        closing.join(20)
    finally:
        handle.remove()
    finished = request.result(timeout=20)
    assert finished.finish_reason == "cancelled"
    assert len(finished.tokens) < 10


def test_a_request_that_is_cancelled_while_the_cancelled_are_looked_for_is_not_lost(small, monkeypatch):
    """As by another thread, just after the engine has seen that it is not cancelled."""
    own, looked = Request.cancelled, []

    def cancelled(request):
        seen = own.fget(request)
        if request in looked:
            request.cancel()
        return seen

    monkeypatch.setattr(Request, "cancelled", property(cancelled))
    with Engine(*small, CONFIG, max_running=1) as engine:
        first = engine.submit("Read all digits.", images=PICTURES[:1], max_new_tokens=30)
        while not engine.stats()["running"]:
            time.sleep(0.001)
        second = engine.submit("Read all digits.", images=PICTURES[:1], max_new_tokens=30)
        looked.append(second)
        assert second.result(timeout=20).finish_reason == "cancelled"
        assert first.result(timeout=20).finish_reason in ("stop", "length")
