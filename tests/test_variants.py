"""Settings that are compared: their names, and the configurations behind them."""

import pytest

from trim_plugin import KCenter, TrimConfig
from trim_plugin.variants import Variant, variants_for


def test_every_rule_becomes_a_variant_with_its_settings():
    found = variants_for([1.0, 0.25], "nf4", shares=[0.1], radii=[0.2], merge=False, tower_share=0.5)
    assert [variant.name for variant in found] == [
        "stock",
        "nothing dropped, nf4, tower 0.5",
        "0.25, dropped, nf4, tower 0.5",
        "k-center 0.1, dropped, nf4, tower 0.5",
        "radius 0.2, dropped, nf4, tower 0.5",
    ]
    assert [variant.stock for variant in found] == [True] + 4 * [False]
    stock, whole, ratio, share, radius = (variant.config for variant in found)
    assert stock is None
    assert whole == TrimConfig(top_k_ratio=1.0, kv_quantization="nf4", merge=False, tower_share=0.5)
    assert ratio == TrimConfig(top_k_ratio=0.25, kv_quantization="nf4", merge=False, tower_share=0.5)
    (covering,), (near,) = share.processors, radius.processors
    assert isinstance(covering, KCenter)
    assert (covering.kept_share, near.radius) == (0.1, 0.2)
    assert (share.kv_quantization, share.merge, share.tower_share) == ("nf4", False, 0.5)


def test_a_configuration_of_ones_own_is_taken_as_it_is():
    config = TrimConfig(top_k_ratio=0.3)
    assert Variant("mine", config).config is config
    assert Variant("mine", {"top_k_ratio": 0.3}).config == config


def test_a_tower_share_of_1_is_none():
    (found,) = variants_for([1.0], tower_share=1.0, stock=False)
    assert (found.name, found.config.tower_share) == ("exact", None)
    with pytest.raises(ValueError, match="tower_share must be a number"):
        variants_for([1.0], tower_share=2.0)
