"""Tells which kept token stands for each visual token: no cache holds that, so it is worked out again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trim_plugin.forward.finding import find_text_model, first_cross_layer, whole_weights
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.forward.projections import layer_keys
from trim_plugin.selection.merging import merge_dropped
from trim_plugin.selection.processors import VisualTokenProcessor
from trim_plugin.selection.visibility import pack


class ScoreRecorder(VisualTokenProcessor):
    """Notes what the rule behind it in a list of processors is given, and changes nothing.

    Example:
        >>> recorder, scores = ScoreRecorder(), torch.tensor([[[0.2, 0.8], [0.4, 0.6]]])
        >>> recorder(scores, torch.tensor([[True, False]]), torch.rand(1, 2, 8)) is scores
        True
        >>> recorder.scores(), recorder.states.shape
        (array([0.3, nan], dtype=float32), torch.Size([1, 2, 8]))
    """

    needs_states = True

    def __init__(self) -> None:
        #: bool (samples, visual tokens) for every call: its visibility group.
        self.groups: list[torch.Tensor] = []
        #: (samples, visual tokens) for every call: scores, means over heads; NaN outside the visibility group.
        self.head_mean: list[torch.Tensor] = []
        #: (samples, visual tokens, width).
        self.states = torch.empty(0, device="cpu")

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Record; shapes as in `VisualTokenProcessor.__call__`."""
        self.groups.append(visible)
        self.head_mean.append(scores.mean(dim=1).masked_fill(~visible, float("nan")).cpu())
        if states is not None:
            self.states = states
        return scores

    def scores(self) -> np.ndarray:
        """Head-mean scores over all visibility groups of a batch of one, (visual tokens,); NaN where no text row may read."""
        return np.fmax.reduce([part[0].numpy() for part in self.head_mean])


def holders(model: Any, cache: TrimmedCache, recorder: ScoreRecorder) -> np.ndarray:
    """The kept token that stands for each visual token, after the first prefill of a merging cache with a batch of one.

    A cache does not keep this: it is worked out again as the prefill did, from the keys of the first cross-attention layer.
    The model is the one that filled the cache, and `recorder` one of the cache's processors.

    Returns:
        int64 (visual tokens,): a kept token holds itself; −1 for tokens that are gone, unread or of a group that decoding cannot
        read.
    """
    states = recorder.states
    kept = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    kept[0, cache.kept_indices[0].to(states.device)] = True
    ids = torch.full_like(kept, -1, dtype=torch.long)
    for number, group in enumerate(recorder.groups):
        if bool((group & kept).any()):
            ids[group] = number
    positions, _ = pack(kept)
    layer = first_cross_layer(find_text_model(model))
    with whole_weights(model, layer):
        features = layer_keys(layer, states).transpose(1, 2).flatten(2)
    merging = merge_dropped(features, kept, ids, torch.ones_like(ids), positions)
    return torch.where(merging.weights[0] > 0, positions[0, merging.slots[0]], -1).cpu().numpy()
