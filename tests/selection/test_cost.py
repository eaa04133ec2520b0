"""What choosing and merging cost: scratch, and waiting for the device."""

from __future__ import annotations

import collections
import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trim_plugin import TopKPerHead, VisualTokenProcessorList
from trim_plugin.selection import merging
from trim_plugin.selection.merging import merge_dropped
from trim_plugin.selection.scoring import visual_token_scores
from trim_plugin.selection.select import Columns, select
from trim_plugin.selection.visibility import Visibility, pack

#: Operations that need a number, or a shape, from the device.
WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "unique_dim")


class CountCalls(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name().removeprefix("aten::").split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waits(self):
        return sum(self.calls[name] for name in WAITS)


def test_merging_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_VALUES", 512)
    states, kept = torch.randn(3, 200, 8), torch.rand(3, 200) < 0.3
    groups = torch.randint(0, 2, (3, 200))
    kept[:, :2], groups[:, :2] = True, torch.tensor([0, 1])
    positions, _ = pack(kept)
    with CountCalls() as count:
        merged = merge_dropped(states, kept, groups, torch.ones_like(groups), positions)
        merged.mean(torch.randn(3, 2, 200, 4))
        merged.mean(states)
    assert count.calls["bmm"] > 5, "in several blocks"
    assert count.waits == 0


class OnMeta(TorchFunctionMode):
    """Shapes alone, so that the 11B model's widths cost nothing; what is read from the device is told: how many are kept."""

    def __init__(self, kept, tokens):
        super().__init__()
        self.numbers = [kept, kept, tokens, 1]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist and args[0].device.type == "meta":
            assert len(args[0]) >= len(self.numbers)
            return self.numbers + [0] * (len(args[0]) - len(self.numbers))
        return function(*args, **(kwargs or {}))


#: Operations that start nothing on a device: views, and asking for room.
NO_LAUNCH = {
    "view",
    "_unsafe_view",
    "expand",
    "transpose",
    "t",
    "permute",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "split",
    "as_strided",
    "detach",
    "alias",
    "unbind",
    "_reshape_alias",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
}


class CountLaunches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        touched = [x for x in tree_flatten((args, kwargs, result))[0] if isinstance(x, torch.Tensor)]
        if name not in NO_LAUNCH and any(tensor.device.type == "meta" for tensor in touched):
            self.launches[name] += 1
        return result


def launches_of_one_choice(share, rows=128, groups=1, tiles=4):
    """Scores, the union over heads, merging, and the means of states, keys and values, at the 11B model's widths."""
    tokens = tiles * 1601
    opened = torch.ones(1, rows, tiles, dtype=torch.bool)
    for group in range(groups):
        opened[:, : group * rows // groups, group * tiles // groups :] = False
    seen = Visibility(opened, torch.zeros(1, rows, dtype=torch.bool))
    assert int(seen.groups().max()) + 1 == groups
    with torch.device("meta"):
        queries, keys, states = (
            torch.empty(1, *shape, dtype=torch.bfloat16)
            for shape in ((32, rows, 128), (8, tokens, 128), (tokens, 4096))
        )
        index, ones = torch.empty(1, tokens, dtype=torch.long), torch.empty(1, tokens, dtype=torch.bool)
    rule = VisualTokenProcessorList([TopKPerHead(0.1)])
    columns = Columns(index, ones, index, index, ones, 0, 1601)
    with OnMeta(round(share * tokens), tokens), CountLaunches() as count:
        scores = visual_token_scores(queries, keys, seen, columns.tile_of, 0.1)
        chosen = select(scores, keys, states, columns, groups, rule, merge=True)
        for tensor in (states, keys, keys):
            chosen.merging.mean(tensor)
    return count.launches.total()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5])
def test_choosing_and_merging_a_page_are_at_most_100_launches(share):
    assert launches_of_one_choice(share) <= 100


def test_many_visibility_groups_are_chosen_from_in_as_many_launches_as_two():
    assert launches_of_one_choice(0.1, groups=8, tiles=8) == launches_of_one_choice(0.1, groups=2, tiles=8)


def test_samples_score_together_where_they_fit():
    """Sixteen short prompts about small pictures in as many launches as two."""

    def launches(batch):
        opened = torch.ones(batch, 4, 1, dtype=torch.bool)
        seen = Visibility(opened, torch.zeros(batch, 4, dtype=torch.bool))
        with torch.device("meta"):
            queries, keys = torch.empty(batch, 8, 4, 16), torch.empty(batch, 2, 100, 16)
            tile_of = torch.empty(batch, 100, dtype=torch.long)
        with CountLaunches() as count:
            visual_token_scores(queries, keys, seen, tile_of, 0.1)
        return count.launches.total()

    assert launches(16) == launches(2)


SCRATCH = """
import pathlib, re, sys, torch
from trim_plugin import KCenter
from trim_plugin.selection.merging import Merging, merge_dropped
torch.set_num_threads(1)
what, tokens, width, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
states = torch.empty(1, tokens, width, dtype=dtype).normal_()
positions = torch.arange(5000)[None]
kept, groups = torch.arange(tokens)[None] < 5000, torch.zeros(1, tokens, dtype=torch.long)
small = torch.ones(1, 64, 64)
small.bmm(small)  # the libraries' own buffers are not scratch
def peak():  # of resident memory, in KiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # from here on: loading the libraries took more than what follows
before = peak()
if what == "alike":
    merged = merge_dropped(states, kept, groups, groups + 1, positions)
    result = merged.slots.nbytes + merged.weights.nbytes
elif what == "means":
    means = Merging(torch.arange(tokens)[None] % 5000, groups + 1, 5000).mean(states)
    result = means.nbytes
else:
    KCenter(20 / tokens).choose(states, groups == 0)
    result = tokens * min(width, 256) * 4  # a row of features for every token
print((peak() - before) * 1024 - result)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read as Linux tells them")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize(
    ("what", "tokens", "width"), [("alike", 51_232, 64), ("means", 12_808, 4096), ("k-center", 12_808, 4096)]
)
def test_scratch_beside_the_result(what, tokens, width, dtype):
    """51,232 tokens are 32 pictures of a tile, or 8 of four; 5,000 are kept. The peak of a process of its own."""
    assert scratch(what, tokens, width, dtype) <= 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["alike", "means", "k-center"])
def test_scratch_beside_the_result_at_full_size(what, dtype):
    assert scratch(what, 51_232, 4096, dtype) <= 64 * 2**20


def scratch(what, tokens, width, dtype):
    command = [sys.executable, "-c", SCRATCH, what, str(tokens), str(width), dtype]
    # Freed blocks go back to the system at once. By default glibc keeps some, more or fewer from run to run.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
