"""The vision tower on fewer tokens: before an early layer, patches that are alike are merged and go on as one.

What is merged is read with the log of its size, as everywhere else (`selection.merging`). From then on the members of a
group would be the same token, since the tower has no rotary positions; before the global layers each tile is marked, and a
group goes on with the mean of its members' marks. What the tower yields is spread to all members, so that nothing behind it
changes.

Three kinds of tokens run through the tower, and only tokens of one kind are merged: patches of real tiles, which all read
everything; padding (whole padding tiles, and the few tokens that fill every tile up), which reads real tiles alone; and the
class tokens of real tiles, which stay alone.

The hooks do nothing outside of `merging_in_tower`. What one call needs lives in a context variable, not on the model.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch

from trim_plugin.arithmetic import PADDING_SHARE, layers_before
from trim_plugin.contract import check_contract
from trim_plugin.forward.finding import Hook, attaching, put_on, take_off
from trim_plugin.selection.k_center import KCenter
from trim_plugin.selection.merging import Merging, merge_dropped
from trim_plugin.selection.rounds import Unread
from trim_plugin.selection.visibility import add_log_sizes, pack

#: The kinds of tokens in `kinds_of_tokens`.
PATCH, PADDING, CLASS = 0, 1, 2

_call: contextvars.ContextVar[TowerCall | None] = contextvars.ContextVar("trim_plugin_tower_call", default=None)


def kinds_of_tokens(tiles: torch.Tensor, patches: int, tokens: int) -> torch.Tensor:
    """What every token of the tower is: `PATCH`, `PADDING` or `CLASS`.

    Args:
        tiles: bool (pictures, tiles), True for real tiles.
        patches: tokens of a tile, its class token counted, what fills it up left out.
        tokens: tokens of a picture, what fills tiles up counted.

    Returns:
        int64 (pictures, tokens).

    Example:
        >>> kinds_of_tokens(torch.tensor([[True, False]]), patches=3, tokens=8).tolist()
        [[2, 0, 0, 1, 1, 1, 1, 1]]
    """
    pictures, most = tiles.shape
    kinds = torch.full((pictures, most, tokens // most), PATCH, device=tiles.device)
    kinds[:, :, 0] = CLASS
    kinds[:, :, patches:] = PADDING
    kinds[~tiles] = PADDING
    return kinds.flatten(1)


def take_square(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The mask (batch, 1, tokens, tokens) of a self-attention among these positions alone, int64 (batch, slots).

    Example:
        >>> take_square(torch.arange(9.0).view(1, 1, 3, 3), torch.tensor([[0, 2]])).tolist()
        [[[[0.0, 2.0], [6.0, 8.0]]]]
    """
    positions = positions.to(mask.device)
    samples = torch.arange(len(mask), device=mask.device)[:, None, None]
    # Indices are broadcast, not laid out: nothing wider than the result exists.
    return mask[samples, 0, positions[:, :, None], positions[:, None, :]][:, None]


def merge_alike(
    states: torch.Tensor,
    kinds: torch.Tensor,
    kept_share: float,
    unread: Unread | None = None,
    on_device: torch.Tensor | None = None,
) -> tuple[Merging, torch.Tensor, torch.Tensor]:
    """Merge tokens that are alike, all tiles of a picture together.

    Args:
        states: (pictures, tokens, width).
        kinds: int64 (pictures, tokens) on the CPU, see `kinds_of_tokens`: what is there to choose from is counted there.
        kept_share: share of the real tiles' patches that stay, rounded up.
        unread: gets what is left for the host to read; None: it reads here, and raises.
        on_device: `kinds` where the states are; None copies them.

    Returns:
        The merging; int64 (pictures, slots), the token that stands for each slot; and bool (pictures, slots), False for slots
        that are there because another picture has more.

    Example:
        >>> states = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]])
        >>> merging, positions, _ = merge_alike(states, torch.tensor([[2, 0, 0, 0, 0]]), 0.5)
        >>> positions.tolist(), merging.sizes.tolist()
        ([[0, 2, 3]], [[1, 2, 2]])
    """
    on_device = kinds.to(states.device) if on_device is None else on_device.to(states.device)
    kept, left = on_device == CLASS, (kinds == CLASS).sum(dim=1)
    # A picture may have no real tile, and nothing needs to be padding: of no members none are chosen.
    for kind, rule in ((PATCH, KCenter(kept_share)), (PADDING, KCenter(PADDING_SHARE))):
        counts = (kinds == kind).sum(dim=1).tolist()
        kept |= rule.choose(states, on_device == kind, sizes=[[count] for count in counts], unread=unread)
        left += torch.tensor([rule.keeps(count) for count in counts], device="cpu")
    positions, valid = pack(kept, longest=int(left.max()))
    return merge_dropped(states, kept, on_device, torch.ones_like(on_device), positions), positions, valid


class TowerCall:
    """One call of the vision tower in which tokens are merged.

    Args:
        tower: the `MllamaVisionModel`.
        share: share of the real tiles' patches that go on.
        tiles: bool (pictures, tiles), True for real tiles.
        on_cpu: the same on the CPU.
        unread: as for `merge_alike`.
    """

    def __init__(
        self, tower: Any, share: float, tiles: torch.Tensor, on_cpu: torch.Tensor, unread: Unread | None = None
    ) -> None:
        layers = tower.transformer.layers
        self._before = layers_before(len(layers))
        #: The local layer before which tokens are merged; None: they are before the global layers.
        self.first = layers[self._before] if self._before < len(layers) else None
        self._local, self._share, self._tiles, self._patches = tower.transformer, share, tiles, tower.num_patches
        self._on_cpu, self._unread = on_cpu, unread
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
            tokens = hidden.shape[1]
            kinds, there = (kinds_of_tokens(tiles, self._patches, tokens) for tiles in (self._on_cpu, self._tiles))
            self._merging, positions, valid = merge_alike(hidden, kinds, self._share, self._unread, there)
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
def merging_in_tower(
    tower: Any,
    share: float | None,
    aspect_ratio_mask: torch.Tensor | None,
    on_cpu: torch.Tensor | None = None,
    unread: Unread | None = None,
) -> Iterator[None]:
    """Within this context one call of the vision tower merges patches; with `share` None it is untouched.

    Args:
        tower: an `MllamaVisionModel`; hooks are put on it if it has none yet.
        share: share of the real tiles' patches that go on.
        aspect_ratio_mask: (batch, pictures, tiles), 1 for real tiles, of the call. None, which transformers refuses, is left to
            its own error.
        on_cpu: the same on the CPU; None reads it.
        unread: as for `merge_alike`.

    Raises:
        RuntimeError: the tower ran and nothing was merged, because it runs without its hooks.
    """
    if share is None or aspect_ratio_mask is None:
        yield
        return
    attach_to_tower(tower)
    tiles = aspect_ratio_mask.flatten(0, 1) != 0
    call = TowerCall(tower, share, tiles, tiles.cpu() if on_cpu is None else on_cpu.flatten(0, 1) != 0, unread)
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
