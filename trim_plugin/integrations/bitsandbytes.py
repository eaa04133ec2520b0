"""Mllama with weights in 4 or 8 bits: presets for bitsandbytes, and what the weights take."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from trim_plugin.arithmetic import format_bytes
from trim_plugin.cache.report import held_bytes
from trim_plugin.planning.model_sizes import model_part

PRESETS = ("nf4", "fp4", "int8")

SKIPPED = ("multi_modal_projector", "lm_head")
"""Modules that no preset quantizes.

`multi_modal_projector` gets a 5-D input, which bitsandbytes' 8-bit matmul cannot take on the CPU; it is 31 million of 11B's
parameters. `lm_head` decides between close logits, and transformers leaves it alone too unless a list of its own is given.
"""

VISION_TOWER = ".*vision_model"
"""Matches the vision tower's modules in every Mllama class."""

CASTING_LOGGER = "bitsandbytes.autograd._functions"
"""Logs at every call of every 8-bit layer, hundreds of lines a prompt, that a bfloat16 or float32 input is cast."""


def quantization_config(
    preset: str,
    *,
    quantize_vision: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    skip: Sequence[str] = (),
    **overrides: Any,
) -> Any:
    """A `BitsAndBytesConfig` that is right for Mllama on CPU and GPU, for `from_pretrained(quantization_config=...)`.

    Args:
        preset: "nf4" or "fp4" (4 bits, scales quantized too) or "int8" (LLM.int8).
        quantize_vision: whether the vision tower is quantized as well; False leaves it in the dtype of loading.
        compute_dtype: what the 4-bit presets compute in. "int8" computes in the dtype of its input.
        skip: further modules to leave alone: name endings, or regular expressions for the beginning.
        overrides: any argument of `BitsAndBytesConfig`, instead of the preset's own.

    Raises:
        ValueError: unknown preset.

    Source: QLoRA, Dettmers et al. 2023, arXiv 2305.14314 (4 bits); LLM.int8, Dettmers et al. 2022, arXiv 2208.07339.

    Example:
        >>> config = quantization_config("nf4", quantize_vision=False)
        >>> config.bnb_4bit_quant_type, config.llm_int8_skip_modules
        ('nf4', ['multi_modal_projector', 'lm_head', '.*vision_model'])
        >>> quantization_config("int4")
        Traceback (most recent call last):
        ...
        ValueError: Unknown quantization preset 'int4'. Allowed: 'nf4', 'fp4', 'int8'.
    """
    from transformers import BitsAndBytesConfig

    if preset not in PRESETS:
        raise ValueError(f"Unknown quantization preset {preset!r}. Allowed: {', '.join(map(repr, PRESETS))}.")
    settings: dict[str, Any] = {
        "llm_int8_skip_modules": [*SKIPPED, *([] if quantize_vision else [VISION_TOWER]), *skip]
    }
    if preset == "int8":
        logging.getLogger(CASTING_LOGGER).addFilter(_first_time)
        settings["load_in_8bit"] = True
    else:
        settings |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": preset,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_use_double_quant": True,
        }
    return BitsAndBytesConfig(**(settings | overrides))


_logged: set[str] = set()


def _first_time(record: logging.LogRecord) -> bool:
    """A logging filter: let every message through once."""
    new = record.getMessage() not in _logged
    _logged.add(record.getMessage())
    return new


def use_standard_layout(model: torch.nn.Module, only_misfits: bool = False) -> None:
    """Keep 4-bit weights in bitsandbytes' standard layout on CPUs with AVX512-BF16, and bring them back to it.

    There, the first inference repacks a layer's weights for a kernel that is 150 times as fast for one token (measured for
    4096 x 4096 on two cores: 1.2 ms against 192 ms). But peft's merging reads repacked weights wrongly, and layers whose
    outputs are no multiple of 32, or inputs no multiple of the block size, fail (bitsandbytes 0.50.2, peft 0.21.2).
    Bringing weights back rounds their scales. Elsewhere, and for models without 4-bit layers, this does nothing.

    Args:
        model: a model, quantized or not.
        only_misfits: leave alone the layers that the fast kernel can take.
    """
    for module in _four_bit_layers(model):
        state = module.weight.quant_state
        fits = module.out_features % 32 == 0 and module.in_features % module.weight.blocksize == 0
        if only_misfits and fits:
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes' public way back: saving unpacks in place


def repack_for_cpu(model: torch.nn.Module) -> None:
    """Do the repacking that `use_standard_layout` describes now, not in the first forward.

    Two threads whose first forwards met would otherwise both repack the same weights.
    """
    with torch.no_grad():
        for module in _four_bit_layers(model):
            if module.weight.device.type == "cpu" and module.support_avx512bf16_for_cpu:
                module(torch.zeros(1, module.in_features, dtype=module.compute_dtype, device="cpu"))


@contextlib.contextmanager
def layout_kept(model: torch.nn.Module) -> Iterator[None]:
    """Undo what reading a model's `state_dict` does to repacked 4-bit weights: it unpacks them in place, with rounding."""
    stashed = [
        (module.weight, module.weight.data, module.weight.quant_state, dict(vars(module.weight.quant_state)))
        for module in _four_bit_layers(model)
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    ]
    yield
    for weight, data, state, attributes in stashed:
        vars(state).clear()
        vars(state).update(attributes)
        weight.data, weight.quant_state = data, state


def _four_bit_layers(model: torch.nn.Module) -> list[Any]:
    if "bitsandbytes" not in sys.modules:  # which a model with such layers has imported; others do without it
        return []
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


@dataclasses.dataclass(frozen=True)
class WeightMemory:
    """Bytes of a model's weights by part, quantization state included. Prints well.

    Args:
        vision_tower: patch embedding, transformer and global transformer.
        projector: `multi_modal_projector`.
        embeddings: the text's token embeddings.
        self_attention_layers: the text's self-attention decoder layers, their MLPs included.
        cross_attention_layers: the text's cross-attention decoder layers, their MLPs included.
        lm_head: the output layer; 0 where it shares its weights with the embeddings.
        adapters: LoRA weights, wherever they sit.
        other: final norm, rotary frequencies.
        offloaded: of parameters that are not on a device now (accelerate's CPU and disk offload); not part of `total`.

    Example:
        >>> memory = WeightMemory(100, 20, 300, 4000, 1000, 300, 0, 4, 0)
        >>> memory.total
        5724
        >>> print(memory)
        vision tower               100 B
        projector                   20 B
        embeddings                 300 B
        self-attention layers    3.9 KiB
        cross-attention layers    1000 B
        lm_head                    300 B
        other                        4 B
        total                    5.6 KiB
    """

    vision_tower: int
    projector: int
    embeddings: int
    self_attention_layers: int
    cross_attention_layers: int
    lm_head: int
    adapters: int
    other: int
    offloaded: int

    @property
    def total(self) -> int:
        """Bytes held on devices now."""
        return sum(dataclasses.astuple(self)) - self.offloaded

    def rows(self) -> list[tuple[str, int]]:
        """Names and bytes of the parts, those without bytes left out, and the total."""
        names = {"self_attention_layers": "self-attention layers", "cross_attention_layers": "cross-attention layers"}
        rows = [
            (names.get(field.name, field.name if field.name == "lm_head" else field.name.replace("_", " ")), count)
            for field in dataclasses.fields(self)
            if (count := getattr(self, field.name)) and field.name != "offloaded"
        ]
        return [*rows, ("total", self.total), *([("offloaded", self.offloaded)] if self.offloaded else [])]

    def __str__(self) -> str:
        return "\n".join(f"{name:<22} {format_bytes(count):>9}" for name, count in self.rows())


def weight_memory(model: torch.nn.Module) -> WeightMemory:
    """Count the bytes of a model's weights by part, from the tensors that are held.

    Quantized modules count with their scales and codebooks; a storage that two modules share counts once, for the first.

    Args:
        model: an Mllama model or a wrapper around one (peft, for instance), quantized or not.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> memory = weight_memory(load_small_model()[0])
        >>> memory.cross_attention_layers > memory.projector > 0
        True
    """
    parts: dict[str, list[torch.Tensor]] = {field.name: [] for field in dataclasses.fields(WeightMemory)}
    seen: set[tuple[torch.device, int]] = set()
    for part, tensor in _placed_tensors(model):
        if tensor.is_meta:
            parts["offloaded"].append(tensor)
            continue
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if storage not in seen:
            seen.add(storage)
            parts[re.sub(r"\W", "_", part)].append(tensor)
    offloaded = sum(tensor.nbytes for tensor in parts.pop("offloaded"))
    return WeightMemory(offloaded=offloaded, **{name: held_bytes(tensors) for name, tensors in parts.items()})


def _placed_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module holds itself, with the part of the model that it belongs to."""
    crossing = {
        int(place[1])
        for name, module in model.named_modules()
        if isinstance(module, MllamaCrossAttentionDecoderLayer) and (place := re.search(r"layers\.(\d+)", name))
    }
    for name, module in model.named_modules():
        part = ""
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            part = "adapters" if "lora_" in f"{name}.{own}" else model_part(f"{name}.{own}", crossing)
            yield from ((part, one) for one in (tensor, *_quantization_state(tensor)))
        yield from ((part, one) for one in _quantization_state(getattr(module, "state", None)))


def _quantization_state(holder: Any) -> Iterator[torch.Tensor]:
    """Tensors that bitsandbytes keeps beside a weight: 4-bit states (nested or not), 8-bit codes and scales."""
    state = getattr(holder, "quant_state", None)
    while state is not None:
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, torch.Tensor))
        state = getattr(state, "state2", None)  # packed for the CPU, a state has lost it
    for name in ("CB", "SCB"):
        tensor = getattr(holder, name, None)
        if isinstance(tensor, torch.Tensor):
            yield tensor
