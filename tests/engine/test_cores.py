"""The engine's thread has a CPU's cores: no idle OpenMP team of another thread makes its own workers sleep."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, time, torch
torch.set_num_threads(2)
from trim_plugin import Engine
from trim_plugin.embedded import examples, load_small_model

def threads(at_most=0):
    end = time.monotonic() + 10
    while (count := len(os.listdir("/proc/self/task"))) > at_most and time.monotonic() < end and at_most:
        time.sleep(0.01)
    return count

model, processor = load_small_model()
work = torch.ones(512, 512)
(work @ work).add_(work)
teamed = threads()
first = examples()[0]
with Engine(model, processor) as engine:
    started = threads(at_most=teamed)
    answer = engine.submit(first.question, images=[first.picture]).result().text
print(teamed, started, answer.strip() == first.answer, float((work @ work)[0, 0]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not list((Path(torch.__file__).parent / "lib").glob("libgomp*")),
    reason="threads are counted on Linux, with GNU's OpenMP",
)
def test_the_thread_that_made_an_engine_keeps_no_workers() -> None:
    made = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    teamed, started, *right = made.stdout.split()[-4:]
    assert right == ["True", "512.0"]
    # The engine's thread has come, and the main thread's worker has gone.
    assert int(started) <= int(teamed)
