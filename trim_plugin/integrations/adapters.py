"""What an adapter's folder holds, read without its weights: which modules it adapts, and whether it fits a model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

#: Names of before transformers 4.52, in which most published Llama-3.2-Vision adapters are written.
RENAMED = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^vision_model\.": "model.vision_model.",
    r"^multi_modal_projector": "model.multi_modal_projector",
}


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
        config.target_modules = {name for name, tensors in self.shapes.items() if is_lora(tensors)}
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
            if is_lora(tensors) and own != wanted:
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
    if not (folder / WEIGHTS_FILE).is_file():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            raise ValueError(
                f"The adapter {folder} is in pickle format ({pickles[0]}), which can run code when it is read. Only "
                f"{WEIGHTS_FILE} is read: ask its author for safetensors, or convert it where you trust it."
            )
        raise FileNotFoundError(f"no adapter in {folder}: there is no {WEIGHTS_FILE}")
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"The adapter {folder} is damaged: {WEIGHTS_FILE} cannot be read ({error}).") from None
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    renamed = False
    for key, shape in shapes.items():
        key = key.removeprefix("base_model.model.")
        lora = re.fullmatch(r"(.+?)\.(lora_.+)", key)  # "lora_A.weight" and alike
        module, tensor = lora.groups() if lora else (key.rpartition(".")[0], key.rpartition(".")[2])
        new = _new_name(module)
        renamed = renamed or new != module
        modules.setdefault(new, {})[tensor] = shape
    return Adapter(name, str(folder), modules, renamed)


def _new_name(module: str) -> str:
    for pattern, replacement in RENAMED.items():
        module, count = re.subn(pattern, replacement, module)
        if count:
            break
    return module


def is_lora(tensors: Mapping[str, Any]) -> bool:
    """Whether a module's tensors are LoRA's; others replace the module's own."""
    return any(name.startswith("lora_") for name in tensors)
