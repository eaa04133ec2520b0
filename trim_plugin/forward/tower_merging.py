"""The vision tower on fewer tokens: before an early layer, patches that are alike are merged and go on as one.

What is merged is read with the log of its size, as everywhere else (`selection.merging`). From then on the members of a
group would be the same token, since the tower has no rotary positions; before the global layers each tile is marked, and a
group goes on with the mean of its members' marks. What the tower yields is spread to all members, so that nothing behind it
changes.

The hooks do nothing outside of `merging_in_tower`. What one call needs lives in a context variable, not on the model.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch

from trim_plugin.arithmetic import layers_before
from trim_plugin.contract import check_contract
from trim_plugin.forward.finding import Hook, attaching, put_on, take_off
from trim_plugin.selection.merging import Merging
from trim_plugin.selection.thinning import kinds_of_tokens, merge_alike
from trim_plugin.selection.visibility import add_log_sizes, take_square

_call: contextvars.ContextVar[TowerCall | None] = contextvars.ContextVar("trim_plugin_tower_call", default=None)


class TowerCall:
    """One call of the vision tower in which tokens are merged.

    Args:
        tower: the `MllamaVisionModel`.
        share: share of the real tiles' patches that go on.
        tiles: bool (pictures, tiles), True for real tiles.
    """

    def __init__(self, tower: Any, share: float, tiles: torch.Tensor) -> None:
        layers = tower.transformer.layers
        self._before = layers_before(len(layers))
        #: The local layer before which tokens are merged; None: they are before the global layers.
        self.first = layers[self._before] if self._before < len(layers) else None
        self._local, self._share, self._tiles, self._patches = tower.transformer, share, tiles, tower.num_patches
        self._merging: Merging | None = None
        #: Additive (pictures, 1, slots, slots), with log sizes, once tokens are merged.
        self.mask: Any = None

    @property
    def merged(self) -> bool:
        """Whether tokens were merged already."""
        return self._merging is not None

    def reduce(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The groups' means, (pictures, slots, width), of all tokens (pictures, tokens, width); the first time these choose.

        Args:
            hidden: the states.
            mask: additive (pictures, 1, tokens, tokens), as transformers made it.
        """
        if self._merging is None:
            kinds = kinds_of_tokens(self._tiles.cpu(), self._patches, hidden.shape[1])
            self._merging, positions, valid = merge_alike(hidden, kinds, self._share)
            own = add_log_sizes(take_square(mask, positions), self._merging.sizes)
            # More than closed: a picture without a real tile reads its closed tokens alike, in company as alone.
            self.mask = own.masked_fill(~valid.to(own.device)[:, None, None], -torch.inf)
        return self._merging.mean(hidden)

    def spread(self, encoder: Any, output: Any) -> Any:
        """An encoder's output with what is read of it given to every member of a group. What nobody reads stays small."""
        if self._merging is None:
            return output
        states = output.hidden_states
        if encoder is self._local and states is not None:
            read = {index % len(states) for index in encoder.config.intermediate_layers_indices}
            read = {index for index in read if index >= self._before}  # earlier ones are whole
            output.hidden_states = tuple(
                self._to_members(self._merging, one) if index in read else one for index, one in enumerate(states)
            )
        output.last_hidden_state = self._to_members(self._merging, output.last_hidden_state)
        return output

    @staticmethod
    def _to_members(merging: Merging, hidden: torch.Tensor) -> torch.Tensor:
        slots = merging.slots.to(hidden.device)
        return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))


@contextlib.contextmanager
def merging_in_tower(tower: Any, share: float | None, aspect_ratio_mask: torch.Tensor | None) -> Iterator[None]:
    """Within this context one call of the vision tower merges patches; with `share` None it is untouched.

    Args:
        tower: an `MllamaVisionModel`; hooks are put on it if it has none yet.
        share: share of the real tiles' patches that go on.
        aspect_ratio_mask: (batch, pictures, tiles), 1 for real tiles, of the call. None, which transformers refuses, is left to
            its own error.

    Raises:
        RuntimeError: the tower ran and nothing was merged, because it runs without its hooks.
    """
    if share is None or aspect_ratio_mask is None:
        yield
        return
    attach_to_tower(tower)
    call = TowerCall(tower, share, aspect_ratio_mask.flatten(0, 1) != 0)
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
    if not call.merged:
        raise RuntimeError(
            "tower_share was given, but the vision tower ran without trim_plugin's hooks: it was compiled before they were put "
            "on it. Compile it after trim_plugin.encode_pictures or generate has run once with tower_share, or leave it out."
        )


def attach_to_tower(tower: Any) -> None:
    """Put the hooks on a vision tower, once. Outside of `merging_in_tower` they do nothing.

    Raises:
        UnsupportedTransformersError: this transformers lacks something that the hooks rely on; none is put on then.
    """
    check_contract()
    with attaching:
        if before_global_layers in tower.global_transformer._forward_pre_hooks.values():
            return
        for module in tower.modules():
            take_off(module)
        for layer in tower.transformer.layers:
            put_on(layer, before_local_layer)
        put_on(tower.global_transformer, before_global_layers)
        for encoder in (tower.transformer, tower.global_transformer):
            encoder.register_forward_hook(after_encoder)


@Hook
def before_local_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of a local encoder's layer: merge before the first that runs on fewer tokens, hand on the mask after."""
    call = _call.get()
    if call is None or not (call.merged or layer is call.first):
        return None
    if call.merged:
        return args, {**kwargs, "attention_mask": call.mask}
    name = "hidden_states" if "hidden_states" in kwargs else "hidden_state"  # as transformers 5.17 calls it
    hidden = call.reduce(kwargs[name], kwargs["attention_mask"])
    return args, {**kwargs, name: hidden, "attention_mask": call.mask}


@Hook
def before_global_layers(
    encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of the global encoder: its layers run on the same groups."""
    call = _call.get()
    if call is None:
        return None
    hidden = call.reduce(args[0], kwargs["attention_mask"])
    return (hidden, *args[1:]), {**kwargs, "attention_mask": call.mask}


@Hook
def after_encoder(encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of both encoders."""
    call = _call.get()
    return None if call is None else call.spread(encoder, output)


TOWER_HOOKS = (before_local_layer, before_global_layers, after_encoder)
