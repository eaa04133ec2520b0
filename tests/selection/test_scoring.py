import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_plugin.selection import scoring
from trim_plugin.selection.scoring import visual_token_scores
from trim_plugin.selection.visibility import Visibility


def plain_scores(queries, keys, rows, voters, scaling, log_sizes=None):
    """The whole attention map at once."""
    repeats = queries.shape[1] // keys.shape[1]
    logits = (queries @ keys.repeat_interleave(repeats, 1).transpose(2, 3)).float() * scaling
    logits = logits if log_sizes is None else logits + log_sizes[:, None, None]
    logits = logits.masked_fill(~rows[:, None], float("-inf"))
    attention = logits.softmax(dim=-1).nan_to_num() * (rows & voters[..., None])[:, None]
    readers = (rows & voters[..., None]).sum(dim=1)[:, None]
    return (attention.sum(dim=2) / readers).masked_fill(readers == 0, float("-inf"))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(4, 2), (4, 4), (3, 1)]),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.sampled_from([64, 512, 1 << 20]),
    st.booleans(),
)
def test_blocks_give_what_the_whole_map_gives(heads, batch, rows, tiles, seed, block_bytes, merged):
    """Columns that are no token, as between samples of several turns, get −inf."""
    torch.manual_seed(seed)
    tokens = 3 * tiles
    queries, keys = torch.randn(batch, heads[0], rows, 8), torch.randn(batch, heads[1], tokens, 8)
    seen = Visibility(torch.rand(batch, rows, tiles) < 0.7, torch.rand(batch, rows) < 0.2)
    tile_of = torch.randint(tiles, (batch, tokens)).sort(dim=1).values
    log_sizes = None
    if merged:
        log_sizes = torch.randint(1, 50, (batch, tokens)).float().log()
        tile_of = tile_of.masked_fill(torch.rand(batch, tokens) < 0.2, -1)
    before, scoring.BLOCK_BYTES = scoring.BLOCK_BYTES, block_bytes
    try:
        scores = visual_token_scores(queries, keys, seen, tile_of, 0.3, log_sizes)
    finally:
        scoring.BLOCK_BYTES = before
    reads = seen.open.gather(2, tile_of.clamp(min=0)[:, None].expand(-1, rows, -1)) & (tile_of >= 0)[:, None]
    expected = plain_scores(queries, keys, reads, seen.query_rows, 0.3, log_sizes)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)


SCRATCH = """
import resource, sys, torch
from trim_plugin.selection.scoring import visual_token_scores
from trim_plugin.selection.visibility import Visibility
torch.set_num_threads(2)
rows, heads, tokens, dim, dtype = int(sys.argv[2]), int(sys.argv[3]), 51232, int(sys.argv[4]), getattr(torch, sys.argv[1])
queries = torch.empty(1, heads, rows, dim, dtype=dtype).normal_()
keys = torch.empty(1, heads // 4, tokens, dim, dtype=dtype).normal_()
seen = Visibility(torch.ones(1, rows, 1, dtype=torch.bool), torch.zeros(1, rows, dtype=torch.bool))
small = torch.ones(1, 64, 64, dtype=dtype)
small.bmm(small)  # the libraries' own buffers are not scratch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = visual_token_scores(queries, keys, seen, torch.zeros(1, tokens, dtype=torch.long), dim**-0.5)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert torch.allclose(scores.sum(dim=-1), torch.ones(1, heads), atol=1e-3)
print((after - before) * 1024 - scores.nbytes)
"""


def scratch(dtype, rows, heads, head_dim):
    """Bytes beyond the result at the peak of a process of its own, for eight pictures."""
    arguments = [dtype, str(rows), str(heads), str(head_dim)]
    result = subprocess.run([sys.executable, "-c", SCRATCH, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_scratch_of_a_prompt_with_eight_pictures(dtype):
    """Neither the map of all rows of a head (75 MiB) nor repeated or up-cast keys (62 MiB and more) fit beside a block."""
    assert scratch(dtype, rows=384, heads=8, head_dim=160) <= 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_of_a_long_prompt_with_eight_pictures(dtype):
    """4,096 rows, 32 heads, 51,232 tokens. (Scratch does not depend on head_dim.)"""
    assert scratch(dtype, rows=4096, heads=32, head_dim=32) <= 64 * 2**20
