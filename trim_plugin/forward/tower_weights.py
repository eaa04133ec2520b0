"""Measures the layers of vision tower and projector, with their adapters: a row of numbers a layer, which fingerprints compare.

A layer is measured by what it makes of a few fixed vectors, so that an adapter and the same adapter merged measure alike. Peft's
wrappers are known by their attributes; a copy of a wrapper, in float64 and around a layer of its own, is what runs. The model is
read and never changed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Vectors that a layer is measured with.
PROBES = 4
#: Columns of a row: the format of the weights (the spacing of its numbers; `QUANTIZED`), the adapters' (0: no adapter is around;
#: negative: some are merged), the length of what the layer makes of the vectors, then `PROBES` numbers each of: that, without
#: adapters; what active adapters add; what they add to a made-up layer that is the same for every model.
COLUMNS = 3 + 3 * PROBES
QUANTIZED = 1.0
#: Weights are read so many at a time.
_AT_A_TIME = 1 << 22
#: What a wrapper of a kind that is not known may raise.
_STRANGE = (TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError)


def measured(parts: list[nn.Module]) -> torch.Tensor:
    """A row for every layer of tower and projector, float32 (layers, COLUMNS), on the CPU; NaN where weights cannot be read.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> measured([layer]).shape == (1, COLUMNS), bool(measured([layer]).isnan().any())
        (True, False)
    """
    if is_sharded(parts):
        return torch.full((1, COLUMNS), math.nan, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        return torch.stack([row for part in parts for row in _rows(part)]).float().cpu()


def is_sharded(parts: list[nn.Module]) -> bool:
    """Whether some weights are spread over processes (FSDP, tensor parallelism): none of them can be read by itself."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return any(hasattr(p, "_local_tensor") or hasattr(p, "_is_flat_param") or not p.numel() for p in parameters)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is peft's wrapper around another."""
    wraps = "base_layer" in module._modules or "original_module" in module._modules
    return wraps and hasattr(module, "active_adapters")


def _rows(module: Any) -> Iterator[torch.Tensor]:
    if is_adapter(module) and "original_module" in module._modules:
        yield from _rows(_chosen(module))
    elif is_adapter(module):
        base = module.get_base_layer()
        if _is_layer(base):
            yield _row(base, module)
        else:
            yield from (_unknown() for _ in base.parameters())
    elif _is_layer(module):
        yield _row(module, None)
    else:
        yield from map(_row_of, module.parameters(recurse=False))
        for child in module.children():
            yield from _rows(child)


def _chosen(module: Any) -> nn.Module:
    """The module that runs in place of one that adapters have whole copies of (`modules_to_save`)."""
    active, copies = list(module.active_adapters), module._modules.get("modules_to_save")
    if copies is None or module.disable_adapters or not active or active[0] not in copies:
        return module._modules["original_module"]
    return copies[active[0]]


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer that an adapter may stand around."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding) or hasattr(module, "in_features")


def _unknown() -> torch.Tensor:
    return torch.full((COLUMNS,), math.nan, dtype=torch.float64, device="cpu")


def _row_of(parameter: torch.Tensor) -> torch.Tensor:
    """The row of weights that belong to no layer: positions, norms, gates."""
    row = _unknown()
    if parameter.is_floating_point() and not parameter.is_meta:
        matrix = parameter.reshape(len(parameter) if parameter.ndim > 1 else 1, -1)
        seen = _times(matrix, _waves(matrix.shape[1], 0, matrix.device))
        row[0], row[1], row[3 + PROBES :] = torch.finfo(parameter.dtype).eps, 0, 0
        row[2], row[3 : 3 + PROBES] = _numbers(seen)
    return row


def _row(base: Any, adapter: Any) -> torch.Tensor:
    """The row of a layer and the adapter around it."""
    row = _unknown()
    row[1], row[3 + PROBES :] = 0, 0
    if adapter is not None:
        row[1] = _format_of(adapter, base)
    plain = all(
        type(p) in (torch.Tensor, nn.Parameter) and p.is_floating_point() for p in base.parameters(recurse=False)
    )
    weight = getattr(base, "weight", None)
    if plain and isinstance(weight, torch.Tensor) and not weight.is_meta:
        row[0] = torch.finfo(weight.dtype).eps
        seen = _seen(base, weight)
        row[2], row[3 : 3 + PROBES] = _numbers(seen)
    elif isinstance(weight, torch.Tensor) and not weight.is_meta and hasattr(base, "in_features"):
        row[0] = QUANTIZED
        row[2], row[3 : 3 + PROBES] = _numbers(base(_waves(base.in_features, 0, weight.device).float()).double())
    if adapter is None:
        return row
    row[3 + PROBES :] = math.nan
    if not any(p.is_meta for name, p in adapter.named_parameters() if "base_layer" not in name):
        if not row[2].isnan() and row[0] < QUANTIZED:
            row[3 + PROBES : 3 + 2 * PROBES] = _added(adapter, _copy_of(base, {}), unmerging=True)
        row[3 + 2 * PROBES :] = _added(adapter, _made_up(base, adapter), unmerging=False)
    return row


def _format_of(adapter: Any, base: Any) -> float:
    own = {id(parameter) for parameter in base.parameters()}
    spacings = [torch.finfo(p.dtype).eps for p in adapter.parameters() if id(p) not in own and p.is_floating_point()]
    spacing, merged = max(spacings, default=torch.finfo(torch.float32).eps), False
    while is_adapter(adapter):
        merged = merged or bool(adapter.merged_adapters)
        adapter = adapter._modules.get("base_layer", nn.Identity())
    return -spacing if merged else spacing


def _seen(base: Any, weight: torch.Tensor) -> torch.Tensor:
    """What a layer makes of the vectors, float64 (PROBES, outputs)."""
    if isinstance(base, nn.Embedding):
        return _times(weight.T, _waves(len(weight), 0, weight.device))
    matrix = weight.reshape(len(weight), -1)
    seen = _times(matrix, _waves(matrix.shape[1], 0, matrix.device))
    return seen if base.bias is None else seen + base.bias.to(seen)


def _times(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """vectors @ matrix.T in the vectors' precision, a piece of the matrix at a time."""
    step = max(1, _AT_A_TIME // max(1, matrix.shape[1]))
    return torch.cat([vectors @ rows.to(vectors).T for rows in matrix.split(step)], dim=1)


def _numbers(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The length of what was seen, and a number for each vector that every entry counts in with a factor of its own."""
    return seen.norm().cpu() / PROBES**0.5, (seen * _waves(seen.shape[1], PROBES, seen.device)).sum(dim=1).cpu()


def _waves(length: int, first: int, device: torch.device) -> torch.Tensor:
    """Fixed vectors that don't repeat, (PROBES, length), float64; float32 on devices that know no other."""
    primes = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19], dtype=torch.float64, device="cpu")
    roots = primes.sqrt()[first : first + PROBES, None]
    places = torch.arange(1, length + 1, dtype=torch.float64, device="cpu")
    return _exact((math.sqrt(2) * (places**2 * roots).cos()), device)


def _exact(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _added(adapter: Any, base: nn.Module, *, unmerging: bool) -> torch.Tensor:
    """What adapters add to a layer, a number for each vector; NaN for adapters of a kind that is not understood."""
    weight: Any = base.weight
    if isinstance(base, nn.Embedding):
        given = torch.arange(base.num_embeddings, device=weight.device)
    elif isinstance(base, nn.modules.conv._ConvNd):
        given = _waves(weight[0].numel(), 0, weight.device).reshape(PROBES, *weight.shape[1:])
        if base.groups != 1:
            return _unknown()[:PROBES]
    else:
        given = _waves(weight.shape[1], 0, weight.device)
    try:
        before = base(given)
        added = _standing_in(adapter, base, unmerging)(given) - before
    except _STRANGE:
        return _unknown()[:PROBES]
    if isinstance(base, nn.Embedding):
        added = _waves(base.num_embeddings, 0, weight.device) @ added
    return _numbers(_exact(added.reshape(PROBES, -1), weight.device))[1]


def _standing_in(adapter: Any, base: nn.Module, unmerging: bool) -> nn.Module:
    """A copy of an adapter around another layer. One that is disabled takes out what is merged, if `unmerging`."""
    inner = adapter._modules["base_layer"]
    around = _standing_in(inner, base, unmerging) if is_adapter(inner) else base
    changed = _copy_of(adapter, {"base_layer": around})
    if hasattr(changed, "merged_adapters"):
        taken_out = unmerging or not adapter.disable_adapters
        changed.merged_adapters = list(adapter.merged_adapters) if taken_out else []
    return changed


def _copy_of(module: Any, replaced: dict[str, nn.Module]) -> Any:
    """A copy of a module with its floats in float64, without hooks and dropout, and with some modules in place of its own."""
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    made: Any = object.__new__(type(module))
    made.__dict__.update({name: dict(value) if type(value) is dict else value for name, value in vars(module).items()})
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, bound to the module that is copied
        made.__dict__.pop(name, None)
    made.__dict__.update({name: OrderedDict() for name in vars(module) if name.endswith("_hooks") or "_hooks_" in name})
    made.__dict__["training"] = False
    made.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(_widened(p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    made.__dict__["_buffers"] = {name: None if b is None else _widened(b) for name, b in module._buffers.items()}
    made.__dict__["_modules"] = {
        name: replaced[name] if name in replaced else None if child is None else _copy_of(child, {})
        for name, child in module._modules.items()
    }
    return made


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return _exact(tensor.detach(), tensor.device).clone() if tensor.is_floating_point() else tensor.detach().clone()


def _made_up(base: Any, adapter: Any) -> Any:
    """A layer of this layer's shape, with weights that depend on nothing else."""
    own = {id(parameter) for parameter in base.parameters()}
    device = next((p.device for p in adapter.parameters() if id(p) not in own), torch.device("cpu"))
    if isinstance(base, nn.Embedding):
        made: Any = nn.Embedding(base.num_embeddings, base.embedding_dim, device="meta")
    elif isinstance(base, nn.modules.conv._ConvNd):
        made = _copy_of(base, {})
    else:
        made = nn.Linear(
            base.in_features, base.out_features, bias=getattr(base, "bias", None) is not None, device="meta"
        )
    for name, parameter in list(made._parameters.items()):
        if parameter is not None:
            rows = len(parameter) if parameter.ndim > 1 else 1
            heights, width = _waves(rows, 0, device)[0, :, None], _waves(parameter.numel() // rows, PROBES, device)[0]
            made._parameters[name] = nn.Parameter(
                (heights * width).reshape(parameter.shape) * len(width) ** -0.5, False
            )
    return made
