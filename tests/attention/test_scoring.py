import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_plugin.attention import scoring
from trim_plugin.attention.scoring import visual_token_scores
from trim_plugin.attention.visibility import Visibility


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
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([64, 512, 1 << 20]),
    st.booleans(),
)
def test_blocks_give_what_the_whole_map_gives(heads, batch, rows, lengths, seed, block_bytes, merged):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    queries, keys = torch.randn(batch, heads[0], rows, 8), torch.randn(batch, heads[1], tokens, 8)
    runs = torch.rand(batch, rows, len(lengths)) < 0.7
    voters = runs.any(-1) & (torch.rand(batch, rows) < 0.8)
    seen = Visibility(runs, voters, torch.tensor(lengths))
    log_sizes = torch.randint(1, 50, (batch, tokens)).float().log() if merged else None
    before, scoring.BLOCK_BYTES = scoring.BLOCK_BYTES, block_bytes
    try:
        scores = visual_token_scores(queries, keys, seen, 0.3, log_sizes)
    finally:
        scoring.BLOCK_BYTES = before
    expected = plain_scores(queries, keys, seen.spread(runs), voters, 0.3, log_sizes)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)


SCRATCH = """
import resource, sys, torch
from trim_plugin.attention.scoring import visual_token_scores
from trim_plugin.attention.visibility import Visibility
torch.set_num_threads(2)
rows, heads, tokens, dim, dtype = 4096, 32, 51232, 32, getattr(torch, sys.argv[1])
queries = torch.empty(1, heads, rows, dim, dtype=dtype).normal_()
keys = torch.empty(1, 8, tokens, dim, dtype=dtype).normal_()
reads = torch.ones(1, rows, 1, dtype=torch.bool)
small = torch.ones(1, 64, 64, dtype=dtype)
small.bmm(small)  # the libraries' own buffers are not scratch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = visual_token_scores(queries, keys, Visibility(reads, reads[..., 0], torch.tensor([tokens])), dim**-0.5)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert torch.allclose(scores.sum(dim=-1), torch.ones(1, heads), atol=1e-3)
print((after - before) * 1024 - scores.nbytes)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_of_a_long_prompt_with_eight_pictures(dtype):
    """4,096 rows, 32 heads, 51,232 tokens; the peak of a process of its own. (Scratch does not depend on head_dim.)"""
    result = subprocess.run([sys.executable, "-c", SCRATCH, dtype], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 64 * 2**20
