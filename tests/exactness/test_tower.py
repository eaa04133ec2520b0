"""A tower that merges, against an untouched one in which every token's state is replaced by the mean of its group.

Members of a group are equal from the merging on, so that both are the same function. `pytest` runs 40 examples, `-m slow` 1,000.
"""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MllamaConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionEncoderLayer, MllamaVisionModel

import trim_plugin
from trim_plugin import TrimConfig, TrimmedCache, prefill
from trim_plugin.arithmetic import layers_before, tokens_left
from trim_plugin.compat import CACHE
from trim_plugin.forward import tower_merging
from trim_plugin.forward.tower_merging import merge_alike, merging_in_tower

from ..random_models import (
    TILE_COUNTS,
    TILES,
    Sample,
    generate,
    largest_difference,
    largest_logit,
    random_config,
    random_inputs,
    random_model,
    trimmed,
)

PATCHES, FILLED = 5, 8  # of a tile of the random models: with its class token, and filled up
BATCH = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4)), Sample(((7, 8), 2))]
SHARE = 0.5


def random_tower(seed, local, read, attention="sdpa", size=8, global_layers=2):
    config: MllamaConfig = random_config(image_size=size, attention=attention)
    vision = config.vision_config
    vision.num_hidden_layers, vision.num_global_layers = local, global_layers
    vision.intermediate_layers_indices = read
    vision.vision_output_dim = (1 + len(read)) * vision.hidden_size
    vision._attn_implementation = attention
    torch.manual_seed(seed)
    tower = MllamaVisionModel(vision).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "gate" in name:
                parameter.fill_(0.8)
            elif parameter.ndim >= 2:
                parameter.normal_(0.0, 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
    return tower


def pictures_of(tower, tiles, seed):
    generator = torch.Generator().manual_seed(seed)
    size = tower.config.image_size
    return {
        "pixel_values": torch.randn(len(tiles), 1, TILES, 3, size, size, generator=generator),
        "aspect_ratio_ids": torch.tensor(tiles)[:, None],  # ids 1 to 4 are 1 to 4 tiles in a row
        "aspect_ratio_mask": (torch.arange(TILES) < torch.tensor(tiles)[:, None]).long()[:, None],
    }


def kinds_by_hand(tiles, patches, filled):
    tile = [[2] + [0] * (patches - 1) + [1] * (filled - patches), [1] * filled]
    return torch.tensor([[kind for number in range(TILES) for kind in tile[number >= count]] for count in tiles])


@contextlib.contextmanager
def replaced_by_means(tower, share):
    """Within this context the states of an untouched tower are replaced: group by group, token by token."""
    local, around = list(tower.transformer.layers), list(tower.global_transformer.layers)
    layers = [*local[layers_before(len(local)) :], *around]
    patches = tower.num_patches
    tiles, groups = [], []

    def begin(tower, args, kwargs):
        tiles[:] = kwargs["aspect_ratio_mask"].flatten(0, 1).sum(dim=1).tolist()
        groups.clear()

    def replace(layer, args, kwargs):
        name = "hidden_states" if "hidden_states" in kwargs else "hidden_state"
        states = kwargs[name].clone()
        if not groups:
            kinds = kinds_by_hand(tiles, patches, states.shape[1] // TILES)
            groups.append(merge_alike(states, kinds, share)[0].slots)
        for picture, slots in enumerate(groups[0]):
            for slot in slots.unique():
                states[picture, slots == slot] = states[picture, slots == slot].mean(dim=0)
        return args, {**kwargs, name: states}

    handles = [layer.register_forward_pre_hook(replace, with_kwargs=True) for layer in layers]
    handles.append(tower.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def tokens_seen(tower):
    """Notes how many tokens each layer of the tower runs on, in the order in which they run."""
    seen = []

    def note(layer, args, output):
        seen.append(output.shape[1])

    layers = [module for module in tower.modules() if isinstance(module, MllamaVisionEncoderLayer)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def both(tower, tiles, share, seed=0):
    inputs = pictures_of(tower, tiles, seed)
    with torch.no_grad():
        with merging_in_tower(tower, share, inputs["aspect_ratio_mask"]):
            merged = tower(**inputs).last_hidden_state
        with replaced_by_means(tower, share):
            expected = tower(**inputs).last_hidden_state
    return merged, expected


@st.composite
def drawn_towers(draw):
    """A random tower, the tiles of some pictures, a share, and a seed."""
    local, seed = draw(st.integers(1, 6)), draw(st.integers(0, 10_000))
    read = draw(st.lists(st.integers(-local, local - 1), min_size=1, max_size=3))
    tower = random_tower(seed, local, read, draw(st.sampled_from(["sdpa", "eager"])), draw(st.sampled_from([8, 16])))
    tiles = draw(st.lists(st.integers(1, TILES), min_size=1, max_size=4))
    return tower, tiles, draw(st.sampled_from([0.1, 0.3, 0.5, 0.75])), seed


def check_restatement(drawn):
    merged, expected = both(*drawn)
    assert merged.shape == expected.shape
    assert float((merged - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@given(drawn_towers())
def test_equals_an_untouched_tower_in_which_tokens_are_their_groups_means(drawn):
    check_restatement(drawn)


@pytest.mark.slow
@settings(settings.get_profile("slow"))
@given(drawn_towers())
def test_equals_an_untouched_tower_many_times(drawn):
    check_restatement(drawn)


@pytest.mark.parametrize("broken", ["sizes", "spread"])
def test_the_restatement_tells_when_log_sizes_or_members_are_wrong(broken):
    tower = random_tower(3, 4, [1, 3])
    merged, expected = both(tower, [1, 3], SHARE)
    right = float((merged - expected).abs().max())
    wrong = {
        "sizes": mock.patch.object(tower_merging, "add_log_sizes", lambda mask, sizes: mask),
        "spread": mock.patch.object(
            tower_merging.TowerCall,
            "_to_members",
            staticmethod(
                lambda merging, hidden: hidden.gather(
                    1, merging.slots.flip(1)[..., None].expand(-1, -1, hidden.shape[-1])
                )
            ),
        ),
    }
    with wrong[broken]:
        merged, expected = both(tower, [1, 3], SHARE)
    assert right < 1e-4 < 1e-2 < float((merged - expected).abs().max())


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_layers_behind_the_merging_get_that_many_tokens_and_captured_states_shrink(tiles):
    tower = random_tower(0, 4, [0, 2])
    inputs, captured = pictures_of(tower, [tiles], 1), []

    def capture(encoder, args, output):
        captured.extend(states.shape[1] for states in output.hidden_states)

    with torch.no_grad(), tokens_seen(tower) as seen, merging_in_tower(tower, SHARE, inputs["aspect_ratio_mask"]):
        handle = tower.transformer.register_forward_hook(capture)
        tower(**inputs)
    handle.remove()
    left = tokens_left(tiles, TILES, PATCHES, TILES * FILLED, SHARE)
    assert seen == [TILES * FILLED] + [left] * 5
    # Layers 0 and 2 are read: what they yield is whole again, the others' states stay small.
    assert captured == [TILES * FILLED, left, TILES * FILLED, left]


def test_without_a_share_no_module_more_is_called_and_every_bit_is_the_same():
    model = random_model()
    inputs = random_inputs(model, BATCH)
    stock = [generate(model, inputs, cache_implementation="trimmed", cache_config={"top_k_ratio": 1.0})]
    stock.append(trimmed(model, inputs, {"top_k_ratio": 1.0, "tower_share": 1.0}))
    trimmed(model, inputs, {"top_k_ratio": 1.0, "tower_share": SHARE})  # leaves hooks behind, which must be inert
    with tokens_seen(model.model.vision_model) as seen:
        stock.append(trimmed(model, inputs, {"top_k_ratio": 1.0, "tower_share": None}))
    assert set(seen) == {TILES * FILLED}
    assert largest_difference(stock[0], stock[1]) == largest_difference(stock[0], stock[2]) == 0.0


CONFIGS = {
    "reachable": {"top_k_ratio": 1.0},
    "merged": {"top_k_ratio": 0.2},
    "dropped": {"top_k_ratio": 0.2, "merge": False},
    "pieces": {"top_k_ratio": 0.2, "prefill_pictures": 1},
    "static": {"top_k_ratio": 0.2, "static": True, "static_bucket": 8},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_reads_what_the_restatement_yields(kind):
    model = random_model()
    inputs = random_inputs(model, BATCH)
    ours = trimmed(model, inputs, {**CONFIGS[kind], "tower_share": SHARE})
    with replaced_by_means(model.model.vision_model, SHARE):
        theirs = trimmed(model, inputs, CONFIGS[kind])
    assert torch.equal(ours.sequences, theirs.sequences)
    assert largest_difference(ours, theirs) <= 1e-5 * largest_logit(theirs)


@pytest.mark.parametrize("batch", [[BATCH[0]], BATCH], ids=["one picture", "several pictures"])
@pytest.mark.parametrize("way", ["plain forward", "prefill"])
def test_every_way_into_the_model_merges(batch, way):
    model = random_model()
    inputs = random_inputs(model, batch)
    expected = trimmed(model, inputs, {"tower_share": SHARE}, new=1).logits[0]
    cache = TrimmedCache(model, TrimConfig(tower_share=SHARE))
    with torch.no_grad(), tokens_seen(model.model.vision_model) as seen:
        if way == "prefill":
            output = prefill(model, cache, **inputs)
        else:
            output = model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    assert max(seen[1:3]) < min(seen[:1]) == TILES * FILLED
    assert torch.allclose(output.logits[:, -1].float(), expected, atol=1e-5)


def test_a_later_turn_with_a_new_picture_merges():
    model = random_model()
    whole = random_inputs(model, [Sample((2, (6,), 5, (3,), 4))])
    images, first = whole["aspect_ratio_ids"].shape[1], 8
    cache = TrimmedCache(model, TrimConfig(top_k_ratio=1.0, tower_share=SHARE))
    turns = [(slice(0, first), slice(0, 1)), (slice(first, None), slice(1, images))]
    with torch.no_grad(), tokens_seen(model.model.vision_model) as seen:
        for rows, pictures in turns:
            until = rows.stop or whole["input_ids"].shape[1]
            output = model(
                input_ids=whole["input_ids"][:, rows],
                attention_mask=whole["attention_mask"][:, :until],
                cross_attention_mask=whole["cross_attention_mask"][:, :until, : pictures.stop],
                **{
                    name: whole[name][:, pictures] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
                },
                **{CACHE: cache},
                use_cache=True,
            )
    full = TILES * FILLED
    left = [tokens_left(tiles, TILES, PATCHES, full, SHARE) for tiles in (TILE_COUNTS[6 - 1], TILE_COUNTS[3 - 1])]
    assert seen == [full, left[0], left[0], full, left[1], left[1]]
    assert bool(output.logits.isfinite().all())


def test_a_failure_inside_the_tower_leaves_the_model_usable():
    model = random_model()
    inputs = random_inputs(model, BATCH)
    before = trimmed(model, inputs, {"tower_share": SHARE})
    stock = generate(model, inputs)
    with mock.patch.object(tower_merging, "merge_alike", side_effect=MemoryError), pytest.raises(MemoryError):
        trimmed(model, inputs, {"tower_share": SHARE})
    assert largest_difference(stock, generate(model, inputs)) == 0.0
    assert largest_difference(before, trimmed(model, inputs, {"tower_share": SHARE})) == 0.0


def test_copies_of_a_model_merge_and_detach_removes_every_hook():
    model = random_model()
    inputs = random_inputs(model, BATCH)
    expected = trimmed(model, inputs, {"tower_share": SHARE})
    copied = copy.deepcopy(model)
    assert largest_difference(expected, trimmed(copied, inputs, {"tower_share": SHARE})) == 0.0
    trim_plugin.detach(copied)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())


def test_a_tower_that_runs_without_the_hooks_says_so():
    model = random_model()
    inputs = random_inputs(model, BATCH)
    with (
        mock.patch.object(tower_merging, "attach_to_tower"),
        pytest.raises(RuntimeError, match="without trim_plugin's hooks"),
    ):
        trimmed(model, inputs, {"tower_share": SHARE})


@pytest.mark.parametrize("pictures", [1, 50])
def test_states_that_are_no_numbers_are_told_before_anything_is_held(pictures):
    """Nothing else looks at them where nothing is chosen behind the tower."""
    model = random_model(image_size=16)
    inputs = random_inputs(model, BATCH)
    cache = TrimmedCache(model, {"tower_share": 0.5, "top_k_ratio": 1.0, "prefill_pictures": pictures})
    spoiled = inputs["pixel_values"].clone()
    spoiled[1, 0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="visual states are NaN"):
        prefill(model, cache, **{**inputs, "pixel_values": spoiled})
    assert cache.batch_size == -1
    prefill(model, cache, **inputs)
    assert cache.batch_size == len(BATCH)


def test_a_picture_without_a_real_tile_is_read_in_company_as_alone():
    """All of its tokens are closed, and so are places that are there because another picture has more: those don't count."""
    model = random_model(image_size=16)
    inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((1, (1,), 3))])
    inputs["aspect_ratio_mask"][1] = 0
    company, alone = (
        trimmed(model, inputs, {"tower_share": 0.25, "top_k_ratio": 1.0, "prefill_pictures": pictures}, 1)
        for pictures in (2, 1)
    )
    assert largest_difference(company, alone) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_near_to_all_bits(autocast):
    tower = random_tower(0, 4, [1])
    inputs = pictures_of(tower, [1, 4], 0)
    mask = inputs["aspect_ratio_mask"]
    with torch.no_grad(), merging_in_tower(tower, 0.99, mask):
        expected = tower(**inputs).last_hidden_state
    tower.to(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), merging_in_tower(tower, 0.99, mask):
        states = tower(**inputs).last_hidden_state.float()
    assert float((states - expected).norm() / expected.norm()) < 0.2


def test_nothing_calls_itself_exact_with_a_share():
    assert TrimConfig(top_k_ratio=1.0).exact
    assert TrimConfig(top_k_ratio=1.0, tower_share=1.0).exact
    config = TrimConfig(top_k_ratio=1.0, tower_share=SHARE)
    assert not config.exact
    assert config.keeps_reachable
    assert list(config.processor_list) == []
