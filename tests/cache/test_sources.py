import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.cache.sources import SourceMap


def test_a_new_map_gives_every_sample_its_own_entry_without_a_copy():
    sources, entries = SourceMap(), torch.randn(3, 2)
    assert not sources.shared
    assert sources.spread(entries) is entries
    assert sources.compacted() is None


def test_one_entry_serves_a_whole_batch_without_a_copy():
    sources, entry = SourceMap(), torch.randn(1, 4)
    sources.repeat(3, batch=1)
    spread = sources.spread(entry)
    assert torch.equal(spread, entry.expand(3, -1))
    assert spread.untyped_storage().data_ptr() == entry.untyped_storage().data_ptr()


def moves():
    """Repeats and selections, by index and by mask, of a batch that never gets empty."""
    return st.lists(st.tuples(st.sampled_from(["repeat", "index", "mask"]), st.integers(0, 10**6)), max_size=5)


@given(st.integers(1, 4), moves())
def test_entries_are_read_as_if_every_sample_had_a_copy_of_its_own(batch, steps):
    sources, entries = SourceMap(), torch.arange(batch)[:, None]
    copies = entries.clone()
    for kind, seed in steps:
        generator, count = torch.Generator().manual_seed(seed), len(copies)
        if kind == "repeat":
            sources.repeat(seed % 3 + 1, count)
            copies = copies.repeat_interleave(seed % 3 + 1, dim=0)
            continue
        if kind == "index":
            chosen = torch.randint(count, (seed % 4 + 1,), generator=generator)
        else:
            chosen = torch.rand(count, generator=generator) < 0.6
            chosen[seed % count] = True
        sources.select(chosen)
        copies = copies[chosen]
        assert torch.equal(sources.spread(entries), copies)
        held = sources.compacted()
        if held is not None:
            entries = entries[held]
        assert torch.equal(sources.spread(entries), copies)
        assert set(entries.flatten().tolist()) >= set(copies.flatten().tolist())
        if held is not None:  # nothing is held that nobody reads
            assert len(entries) <= len(copies)
            assert len(entries.unique()) == len(copies.unique())
    assert torch.equal(sources.spread(entries), copies)
