"""From scores to kept visual tokens."""

from __future__ import annotations

import math

import torch

from trim_plugin.attention.visibility import Visibility
from trim_plugin.rules.processors import VisualTokenProcessorList, processor_name


def select(
    scores: torch.Tensor,
    visibility: Visibility,
    processors: VisualTokenProcessorList,
    first_token: int = 0,
    states: torch.Tensor | None = None,
) -> torch.Tensor:
    """Let the processors choose in every visibility group; the union over heads is kept.

    A sample without any voter keeps everything: its blind rows read all tokens in stock's attention.

    Args:
        scores: float32 (batch, heads, tokens), see `scoring.visual_token_scores`.
        visibility: who may read what.
        processors: the chain that decides; called with the samples that have a first group, then with those that have a
            second one, and so on.
        first_token: tokens before this one were selected in an earlier turn and are all kept.
        states: (batch, tokens from `first_token` on, width), visual states, for processors that need them.

    Returns:
        bool (batch, tokens) on the scores' device.

    Raises:
        TypeError, ValueError: a processor returned something else than scores of the same shape, or removed every token of
            a group; or the scores are NaN.

    Example:
        >>> from trim_plugin import TopKPerHead
        >>> everyone = torch.ones(1, 1, 1, dtype=torch.bool)
        >>> seen = Visibility(everyone, everyone[..., 0], torch.tensor([4]))
        >>> votes = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]])
        >>> select(votes, seen, VisualTokenProcessorList([TopKPerHead(0.25)]))
        tensor([[ True, False, False,  True]])
    """
    if bool(scores.isnan().any()):
        raise ValueError(
            "The attention scores of the visual tokens are NaN: the picture, the text before it or the model's weights "
            "hold NaN or inf, so no head could choose. top_k_ratio=1.0 chooses nothing and does what transformers does."
        )
    kept = ~visibility.voters.any(dim=-1).to(scores.device)[:, None].expand(scores.shape[0], scores.shape[-1])
    kept = kept.clone()
    kept[:, :first_token] = True
    if processors.needs_states and states is not None:
        states = torch.nn.functional.pad(states.to(scores.device), (0, 0, first_token, 0))
    groups = visibility.groups(first_token)
    for turn in range(max(map(len, groups), default=0)):
        samples = [sample for sample, own in enumerate(groups) if len(own) > turn]
        members = torch.stack([groups[sample][turn] for sample in samples]).to(scores.device)
        given = scores[samples].masked_fill(~members[:, None], -math.inf)
        own_states = states[samples] if processors.needs_states and states is not None else None
        survivors = (processors(given, members, own_states) != -math.inf).any(dim=1) & members
        emptied = ~survivors.any(dim=-1)
        if bool(emptied.any()):
            sample = samples[int(emptied.nonzero()[0])]
            names = ", ".join(map(processor_name, processors))
            raise ValueError(
                f"The visual token processors {names} removed every visual token of visibility group {turn} in "
                f"sample {sample}. Leave at least one token of each group above -inf, so that no text row turns blind."
            )
        kept[samples] |= survivors
    return kept
