"""The one formula of a tile's visual tokens, against transformers' model, and sizes in words."""

import pytest
import torch
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from trim_plugin import arithmetic

from .random_models import random_config


@pytest.mark.parametrize("image_size", [8, 16, 20])
def test_a_tile_has_as_many_tokens_as_the_tower_yields(image_size):
    vision = random_config(image_size=image_size).vision_config
    with torch.device("meta"):
        tower = MllamaVisionModel(vision)
    assert arithmetic.tile_tokens(vision) == tower.num_patches
    assert arithmetic.picture_tokens(vision) == vision.max_num_tiles * tower.num_patches
    assert arithmetic.tile_side(vision) ** 2 == tower.num_patches - 1


def test_small_pictures_are_read_many_at_a_time():
    vision = random_config().vision_config  # 20 tokens a picture
    assert arithmetic.pictures_at_a_time(None, vision) == 320
    assert arithmetic.pictures_read_together(None, vision) == 4 * 320
    assert [read(7, vision) for read in (arithmetic.pictures_at_a_time, arithmetic.pictures_read_together)] == [7, 7]


def test_bytes_are_read_with_units():
    assert [arithmetic.parse_bytes(text) for text in ("1GiB", "2 GB", "3mib", "4b")] == [2**30, 2 * 10**9, 3 * 2**20, 4]


@pytest.mark.parametrize(("text", "doubt"), [("24GB", True), ("24 gb", True), ("24GiB", False), ("7B", False)])
def test_powers_of_ten_are_said(text, doubt):
    said = arithmetic.taken_for(text, "--memory")
    assert (said is not None) == doubt
    assert not doubt or "24,000,000,000 bytes, which is 22.35 GiB" in said
