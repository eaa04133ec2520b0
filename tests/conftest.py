"""Fixtures that several test files share."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging as transformers_logging

import trim_plugin
from trim_plugin.embedded import examples, load_small_model

from .random_models import random_model

# `pytest` runs the small profile, `pytest -m slow` the large one (and the soak). The suites of older releases run fewer examples.
EXAMPLES = int(os.environ.get("TRIM_TEST_EXAMPLES", "40"))
_common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=EXAMPLES, **_common)
settings.register_profile("slow", max_examples=1000, **_common)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _registered():
    """Every test starts with the cache registered, whatever the one before did."""
    trim_plugin.register()
    yield
    trim_plugin.register()


@pytest.fixture(autouse=True)
def _current_names(request):
    """No test, nor anything that it calls, asks an output for its cache by a name that the installed transformers has deprecated.

    It logs that once a process. Arguments by such a name warn, which `filterwarnings` in pyproject.toml turns into an error.
    """
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    outputs = logging.getLogger("transformers.utils.generic")
    transformers_logging.warning_once.cache_clear()
    outputs.addHandler(handler)
    yield
    outputs.removeHandler(handler)
    if "former_names" not in request.keywords:
        assert not [one for one in said if "past_key_values" in one], (
            "say cache_of(output), or output.cache in documentation"
        )


@pytest.fixture(autouse=True)
def _threads():
    # Tiny tensors gain nothing from a second thread, and on a busy machine two threads wait for each other. Before every test,
    # since a command's `--threads` outlives the test that ran it.
    torch.set_num_threads(int(os.environ.get("TRIM_TEST_THREADS", "1")))


@pytest.fixture
def model():
    """A tiny random Mllama with sdpa attention."""
    return random_model()


@pytest.fixture(scope="module")
def small():
    """The small trained model and its processor."""
    return load_small_model()


@pytest.fixture
def data(tmp_path):
    """A folder of two held-out pictures with questions."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for example in examples()[:2]:
        (folder / example.picture.name).write_bytes(example.picture.read_bytes())
        lines.append({"picture": example.picture.name, "question": example.question, "answer": example.answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def full_disk():
    """No file may have more than 600 bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))

    def larger():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield larger
    larger()
    signal.signal(signal.SIGXFSZ, handler)
