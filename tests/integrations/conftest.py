"""A random checkpoint with a processor, and random adapters for it, saved once."""

from __future__ import annotations

import pytest
import torch

from benchmarks.small_model.architecture import build_processor

from ..random_models import random_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a random model whose layers fit bitsandbytes' blocks of 64, and a processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model(width=64, vision_width=32).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Folders of two adapters for it: "first" on all text attention, "second" on cross-attention."""
    return {
        name: make_adapter(tmp_path_factory.mktemp(name), preset, seed)
        for name, preset, seed in [("first", "text_attention", 1), ("second", "cross_attention", 2)]
    }


def make_adapter(folder, preset, seed, **settings):
    """Save a random adapter for `random_model(width=64, vision_width=32, **settings)`."""
    from peft import get_peft_model

    from trim_plugin.integrations.peft import lora_config

    model = random_model(**({"width": 64, "vision_width": 32} | settings))
    torch.manual_seed(seed)
    get_peft_model(model, lora_config(preset, rank=4, init_lora_weights=False)).save_pretrained(folder)
    return folder
