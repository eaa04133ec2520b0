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
import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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

WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

#: Names of before transformers 4.52, in which most published Llama-3.2-Vision adapters are written.
_RENAMED = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^vision_model\.": "model.vision_model.",
    r"^multi_modal_projector": "model.multi_modal_projector",
}


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

    _use_standard_layout(model)
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
        key_mapping = _RENAMED if adapter.renamed else None
        weights = load_peft_weights(adapter.folder, device="cpu", key_mapping=key_mapping)
        with _layout_kept(model):
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
                child.to_empty(device=device) if _on_meta(child) else child.to(device)


def _on_meta(module: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


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
    _use_standard_layout(model)
    merged = names[0]
    if len(names) > 1 or weights != [1.0]:
        merged = "+".join(names)
        # "cat" is the exact weighted sum of the updates, whatever the ranks.
        model.add_weighted_adapter(names, weights, merged, combination_type="cat")
    model.set_adapter(merged, inference_mode=True)
    return model.merge_and_unload()


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder, before its weights are read.

    Args:
        name: what it is called on the model.
        folder: where it lies.
        shapes: shape of every tensor, by its module's name as the model has it.
        renamed: whether the file has names of before transformers 4.52.
    """

    name: str
    folder: str
    shapes: dict[str, dict[str, tuple[int, ...]]]
    renamed: bool

    def peft_config(self, trainable: bool) -> Any:
        """Its configuration, aimed at exactly the modules that it has weights for."""
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(self.folder)
        config.target_modules = {name for name, tensors in self.shapes.items() if _is_lora(tensors)}
        config.inference_mode = not trainable
        # Some ways of initialising change the base model's weights; what is initialised here is overwritten anyway.
        config.init_lora_weights = True
        return config

    def check_fits(self, model: torch.nn.Module) -> None:
        """Raise `ValueError` unless the model (its weights may be on meta) has every module that this adapts."""
        modules = dict(getattr(model, "get_base_model", lambda: model)().named_modules())
        for name, tensors in self.shapes.items():
            module = modules.get(name)
            if module is None:
                raise ValueError(
                    f"The adapter {self.folder} is for another architecture: it adapts {name}, which "
                    f"{type(model).__name__} does not have."
                )
            own = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            wanted = (tensors.get("lora_A.weight", (0, own[0]))[1], tensors.get("lora_B.weight", (own[1],))[0])
            if _is_lora(tensors) and own != wanted:
                raise ValueError(
                    f"The adapter {self.folder} is for another architecture: its {name} has {wanted[0]} inputs and {wanted[1]} "
                    f"outputs, the model's has {own[0]} and {own[1]}."
                )


def read_adapters(adapters: str | Path | Mapping[str, str | Path]) -> list[Adapter]:
    """Read what adapters consist of, without reading a weight.

    Raises:
        FileNotFoundError, ValueError: as `load_adapters`.

    Example:
        >>> read_adapters("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no adapter in nowhere: there is no adapter_config.json
    """
    folders = adapters if isinstance(adapters, Mapping) else {"default": adapters}
    if not folders:
        raise ValueError("adapters is empty: give a folder, or a dict from names to folders.")
    return [_read_adapter(name, Path(folder)) for name, folder in folders.items()]


def _read_adapter(name: str, folder: Path) -> Adapter:
    from safetensors import SafetensorError, safe_open

    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter in {folder}: there is no adapter_config.json")
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"The adapter {folder} is damaged: adapter_config.json cannot be read ({error}).") from None
    if kind != "LORA":
        raise ValueError(f"The adapter {folder} is of type {kind}; only LORA is supported.")
    if not (folder / WEIGHTS).is_file():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            raise ValueError(
                f"The adapter {folder} is in pickle format ({pickles[0]}), which can run code when it is read. Only "
                f"{WEIGHTS} is read: ask its author for safetensors, or convert it where you trust it."
            )
        raise FileNotFoundError(f"no adapter in {folder}: there is no {WEIGHTS}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"The adapter {folder} is damaged: {WEIGHTS} cannot be read ({error}).") from None
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    renamed = False
    for key, shape in shapes.items():
        module, tensor = _split(key.removeprefix("base_model.model."))
        new = _new_name(module)
        renamed = renamed or new != module
        modules.setdefault(new, {})[tensor] = shape
    return Adapter(name, str(folder), modules, renamed)


def _split(key: str) -> tuple[str, str]:
    """Module and tensor of a key; LoRA's tensors are named "lora_A.weight" and alike."""
    found = re.fullmatch(r"(.+?)\.(lora_.+)", key)
    return (found[1], found[2]) if found else (key.rpartition(".")[0], key.rpartition(".")[2])


def _new_name(module: str) -> str:
    for pattern, replacement in _RENAMED.items():
        module, count = re.subn(pattern, replacement, module)
        if count:
            break
    return module


def _is_lora(tensors: Mapping[str, Any]) -> bool:
    return any(name.startswith("lora_") for name in tensors)


def _check_loaded(model: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"No adapter {name!r} is loaded. Loaded: {', '.join(map(repr, model.peft_config))}.")


# A model with 4-bit layers has imported bitsandbytes; other models do without it.
def _use_standard_layout(model: torch.nn.Module) -> None:
    if "bitsandbytes" in sys.modules:
        from trim_plugin.integrations.bitsandbytes import use_standard_layout

        use_standard_layout(model)


def _layout_kept(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    if "bitsandbytes" not in sys.modules:
        return contextlib.nullcontext()
    from trim_plugin.integrations.bitsandbytes import layout_kept

    return layout_kept(model)


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
