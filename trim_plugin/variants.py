"""Variants: settings that are compared, with a name each. Torch is loaded once a variant's `config` is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from trim_plugin.arithmetic import checked_share
from trim_plugin.config import TrimConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of several settings.

    Args:
        name: what it is called, in tables and in files of answers.
        settings: of the trimmed cache, as `TrimConfig.of` takes them, rules as JSON has them; None is stock, transformers' own
            cache.

    Example:
        >>> Variant("stock").config is None, Variant("mine", {"top_k_ratio": 0.5}).config.top_k_ratio
        (True, 0.5)
        >>> Variant("covering", {"processors": [{"rule": "KCenter", "kept_share": 0.1}]}).config.processors
        (KCenter(0.1),)
    """

    name: str
    settings: TrimConfig | Mapping[str, Any] | None = None

    @functools.cached_property
    def config(self) -> TrimConfig | None:
        """The trimmed cache's settings; None for stock."""
        return None if self.settings is None else TrimConfig.of(self.settings)

    @property
    def stock(self) -> bool:
        """Whether this is transformers' own cache."""
        return self.settings is None


def variants_for(
    ratios: Sequence[float],
    kv_quantization: str | None = None,
    *,
    shares: Sequence[float] = (),
    radii: Sequence[float] = (),
    merge: bool = True,
    tower_share: float | None = None,
    stock: bool = True,
) -> list[Variant]:
    """Stock, and a trimmed cache for each ratio (1.0 is exact mode) and each value of the other rules.

    Args:
        ratios: `TrimConfig.top_k_ratio`.
        kv_quantization: as in `TrimConfig`.
        shares: of `KCenter`.
        radii: of `KCenter(radius=…)`.
        merge: as in `TrimConfig`. Exact mode drops nothing, so it is the same either way.
        tower_share: as in `TrimConfig`, for all of them but stock. With it a ratio of 1.0 is not exact, and not called so.
        stock: whether transformers' own cache comes first.

    Example:
        >>> [variant.name for variant in variants_for([1.0, 0.25], "int8", shares=[0.1])]
        ['stock', 'exact, int8', '0.25, int8', 'k-center 0.1, int8']
        >>> [variant.name for variant in variants_for([1.0, 0.25], radii=[0.2], merge=False, stock=False)]
        ['exact', '0.25, dropped', 'radius 0.2, dropped']
        >>> [variant.name for variant in variants_for([1.0, 0.25], tower_share=0.5)]
        ['stock', 'nothing dropped, tower 0.5', '0.25, tower 0.5']
    """
    tower_share = checked_share(tower_share)
    whole, tower = ("exact", "") if tower_share is None else ("nothing dropped", f"tower {tower_share:g}")
    rules: list[tuple[str, dict[str, Any]]] = [
        (whole if ratio == 1.0 else f"{ratio:g}", {"top_k_ratio": ratio}) for ratio in ratios
    ]
    covering = [(f"k-center {kept:g}", {"kept_share": kept}) for kept in shares]
    covering += [(f"radius {radius:g}", {"radius": radius}) for radius in radii]
    rules += [(name, {"processors": [{"rule": "KCenter", **values}]}) for name, values in covering]
    variants = [Variant("stock")] if stock else []
    for name, rule in rules:
        settings = rule | {"kv_quantization": kv_quantization, "merge": merge, "tower_share": tower_share}
        forgets = "" if merge or rule.get("top_k_ratio") == 1.0 else "dropped"
        variants.append(Variant(", ".join(filter(None, [name, forgets, kv_quantization, tower])), settings))
    return variants
