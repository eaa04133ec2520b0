"""What a model's `generation_config` asks of greedy `generate`, and no engine does."""

from __future__ import annotations

import reprlib
import warnings
from typing import Any

#: What changes greedy answers of `generate`, and what it is where it changes nothing.
CHANGING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (None, 1)),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (None, 0)
    ),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None, [], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), (None,)),
    **dict.fromkeys(("stop_strings", "max_time", "watermarking_config"), (None,)),
}


def ignored(generation_config: Any) -> dict[str, Any]:
    """The settings without which an engine answers: names and values. Empty if its greedy answers are those of `generate`.

    How tokens are drawn (`do_sample`, `temperature` and their like) is not among them: every request says that itself.

    Example:
        >>> from transformers import GenerationConfig
        >>> ignored(GenerationConfig(no_repeat_ngram_size=3, temperature=0.6))
        {'no_repeat_ngram_size': 3}
    """
    found = {name: getattr(generation_config, name, None) for name in CHANGING}
    return {name: value for name, value in found.items() if value not in CHANGING[name]}


def warn_of_ignored(generation_config: Any) -> None:
    """Warn of what `ignored` finds, in one line."""
    found = ignored(generation_config)
    if found:
        named = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in found.items())
        warnings.warn(
            f"An Engine does not apply {named} of the model's generation_config, so its answers may differ from those of "
            "generate, which does. A request may set repetition_penalty and stop texts itself.",
            UserWarning,
            stacklevel=3,
        )
