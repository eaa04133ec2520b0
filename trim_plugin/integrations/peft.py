"""LoRA on Mllama: presets that name the right tower, loading with checks, switching and merging.

`q_proj` and its siblings exist in the vision tower too, so a bare module name would adapt both towers. The presets name the
text model's layers by their full path.

QLoRA: load the model in 4 bits, put a preset on it, train, save, use it with the trimmed cache:

    model, processor = trim_plugin.integrations.accelerate.load(path, weights="nf4")
    model = prepare_qlora(model, lora_config("text_attention"))
    ...  # train; hooks of the trimmed cache do nothing while no trimmed cache is in use
    model.save_pretrained(folder)

`benchmarks/qlora` does this from beginning to end.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trim_plugin.integrations.adapters import RENAMED, Adapter, read_adapters
from trim_plugin.integrations.bitsandbytes import layout_kept, use_standard_layout

_ATTENTION = r"(q_proj|k_proj|v_proj|o_proj)"
_MLP = r"mlp\.(gate_proj|up_proj|down_proj)"
#: Any decoder layer that is not inside the vision tower.
_TEXT_LAYER = r"(?!.*vision_model)(.*\.)?layers\.\d+\."

PRESETS = {
    "cross_attention": _TEXT_LAYER + rf"cross_attn\.{_ATTENTION}",
    "text_attention": _TEXT_LAYER + rf"(cross_attn|self_attn)\.{_ATTENTION}",
    "text_linear": _TEXT_LAYER + rf"((cross_attn|self_attn)\.{_ATTENTION}|{_MLP})",
}
"""Regular expressions for `LoraConfig(target_modules=...)`, which peft matches against whole module names."""


def lora_config(
    preset: str, rank: int = 16, *, alpha: float | None = None, dropout: float = 0.0, **overrides: Any
) -> Any:
    """A `LoraConfig` for Mllama's text model; the vision tower is never touched.

    Args:
        preset: "cross_attention" (the cross-attention layers' projections), "text_attention" (self-attention too) or
            "text_linear" (the MLPs as well: every linear layer of the text model).
        rank: width of the adapters.
        alpha: the update is scaled by alpha / rank; twice the rank by default.
        dropout: on the adapters' input, while training.
        overrides: any argument of `LoraConfig`.

    Raises:
        ValueError: unknown preset.

    Source: LoRA, Hu et al. 2021, arXiv 2106.09685.

    Example:
        >>> config = lora_config("cross_attention", rank=8)
        >>> import re
        >>> bool(re.fullmatch(config.target_modules, "model.language_model.layers.3.cross_attn.q_proj"))
        True
        >>> bool(re.fullmatch(config.target_modules, "model.vision_model.transformer.layers.3.self_attn.q_proj"))
        False
        >>> lora_config("vision")
        Traceback (most recent call last):
        ...
        ValueError: Unknown LoRA preset 'vision'. Allowed: 'cross_attention', 'text_attention', 'text_linear'.
    """
    from peft import LoraConfig

    if preset not in PRESETS:
        raise ValueError(f"Unknown LoRA preset {preset!r}. Allowed: {', '.join(map(repr, PRESETS))}.")
    settings = {
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": dropout,
        "target_modules": PRESETS[preset],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(settings | overrides))


def prepare_qlora(model: Any, config: Any, *, gradient_checkpointing: bool = False) -> Any:
    """Put trainable adapters on a quantized model.

    Args:
        model: loaded in 4 or 8 bits.
        config: a `LoraConfig`, of `lora_config` for instance.
        gradient_checkpointing: recompute activations in the backward pass.

    Returns:
        A `PeftModel` whose adapters alone are trained; everything that isn't quantized is float32.

    Raises:
        ValueError: the model is not quantized.

    Source: QLoRA, Dettmers et al. 2023, arXiv 2305.14314.
    """
    if not getattr(model, "is_quantized", False):
        raise ValueError(
            f"prepare_qlora is for a model in 4 or 8 bits, and this {type(model).__name__} is not quantized. Load it with "
            'weights="nf4" (trim_plugin.integrations.accelerate.load), or use peft.get_peft_model(model, config) for LoRA.'
        )
    from peft import get_peft_model, prepare_model_for_kbit_training

    use_standard_layout(model)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    with _without_peft_noise():
        return get_peft_model(prepared, config)


def load_adapters(model: Any, adapters: str | Path | Mapping[str, str | Path], *, trainable: bool = False) -> Any:
    """Load LoRA adapters from folders onto a model, after checking that they are safe to read and fit it.

    Only safetensors are read. Adapters are put where their weights say, not where a bare module name might match too. Names
    of before transformers 4.52 are understood.

    Args:
        model: an Mllama model, or what this function returned (to add more).
        adapters: a folder, whose adapter is then called "default", or a dict from names to folders; the first is active.
        trainable: whether to go on training them.

    Returns:
        A `PeftModel`; its `generate` takes `cache_implementation="trimmed"`, and the selection sees adapted projections.

    Raises:
        FileNotFoundError: no such folder, or it holds no adapter.
        ValueError: an adapter in pickle format, of another kind than LoRA, or for another architecture.
    """
    from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

    found = read_adapters(adapters)
    for adapter in found:
        adapter.check_fits(model)
    # Not `PeftModel.from_pretrained`: it would dispatch an offloaded model anew, to other devices than the user's.
    for adapter in found:
        config = adapter.peft_config(trainable)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter.name, config)
        else:
            with _without_peft_noise():
                model = get_peft_model(model, config, adapter.name)
    _follow_layers(model)
    for adapter in found:
        key_mapping = RENAMED if adapter.renamed else None
        weights = load_peft_weights(adapter.folder, device="cpu", key_mapping=key_mapping)
        with layout_kept(model):
            set_peft_model_state_dict(model, weights, adapter_name=adapter.name)
    model.set_adapter(found[0].name, inference_mode=not trainable)
    return model if trainable else model.eval()


@contextlib.contextmanager
def _without_peft_noise() -> Iterator[None]:
    """peft asks for an attribute that transformers has renamed, which tells a user nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _follow_layers(model: torch.nn.Module) -> None:
    """Put adapters, whose weights are still to come, where the layer beside them runs.

    accelerate runs offloaded layers elsewhere than they rest, and peft makes adapters where they rest: on meta. Its own
    `low_cpu_mem_usage` would move loaded adapters there once more.
    """
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, torch.nn.Module):
            continue
        device: Any = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
        device = base.weight.device if device is None else device
        for name, child in module.named_children():
            if name.startswith("lora_") and device != torch.device("meta"):
                on_meta = any(parameter.is_meta for parameter in child.parameters())
                child.to_empty(device=device) if on_meta else child.to(device)


def switch_adapter(model: Any, name: str) -> None:
    """Make another loaded adapter the active one.

    Raises:
        ValueError: no adapter of this name is loaded.
    """
    _check_loaded(model, [name])
    model.set_adapter(name, inference_mode=True)


def merge_adapters(model: Any, names: Sequence[str] | None = None, weights: Sequence[float] | None = None) -> Any:
    """Merge adapters into the model's weights, once, and return the model without peft's wrappers.

    Several are first joined to one, so that quantized weights are rounded once. Merging into 4- or 8-bit weights rounds: the
    merged model is close to the adapted one, not equal.

    Args:
        model: what `load_adapters` returned.
        names: adapters to merge; the active one by default.
        weights: a factor for each; 1.0 by default.

    Raises:
        ValueError: no adapter of this name is loaded, or another number of weights than of names.
    """
    names = list(model.active_adapters if names is None else names)
    weights = [1.0] * len(names) if weights is None else list(weights)
    _check_loaded(model, names)
    if not names or len(weights) != len(names):
        raise ValueError(
            f"Give a weight for each adapter and at least one: got {len(names)} names, {len(weights)} weights."
        )
    use_standard_layout(model)
    merged = names[0]
    if len(names) > 1 or weights != [1.0]:
        merged = "+".join(names)
        # "cat" is the exact weighted sum of the updates, whatever the ranks.
        model.add_weighted_adapter(names, weights, merged, combination_type="cat")
    model.set_adapter(merged, inference_mode=True)
    return model.merge_and_unload()


def _check_loaded(model: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"No adapter {name!r} is loaded. Loaded: {', '.join(map(repr, model.peft_config))}.")


__all__ = [
    "PRESETS",
    "Adapter",
    "load_adapters",
    "lora_config",
    "merge_adapters",
    "prepare_qlora",
    "read_adapters",
    "switch_adapter",
]
