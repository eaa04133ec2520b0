"""What a device would have to do, counted without one: launches, bytes moved and floating-point operations.

Works on tensors without values (``device="meta"``), so that the 11B model's shapes cost nothing, and on real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from benchmarks.common.cost import Counts

#: Operations that start nothing on a device: views, and asking for room.
FREE = frozenset(
    [
        *(
            "view",
            "_unsafe_view",
            "expand",
            "transpose",
            "t",
            "permute",
            "unsqueeze",
            "squeeze",
            "slice",
            "select",
            "split",
        ),
        *(
            "as_strided",
            "detach",
            "alias",
            "unbind",
            "unfold",
            "diagonal",
            "split_with_sizes",
            "_reshape_alias",
            "lift_fresh",
        ),
        *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    ]
)
#: Operations that touch as many rows of their first tensor as they yield.
ROWS = frozenset(["gather", "index", "index_select", "embedding", "take_along_dim"])
#: A sort is several kernels, and passes over what it sorts.
SORTS, PASSES = frozenset(["sort", "topk", "argsort"]), 8


class Counting(TorchDispatchMode):
    """Counts what happens on a device within this context.

    Args:
        device: "meta", or "cpu" for tensors with values, all of which count then.

    Example:
        >>> with Counting("meta") as counting:
        ...     _ = torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")
        >>> counting.found
        Counts(launches=1, bytes=104.0, operations=48.0)
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.found = Counts()
        #: What a host is told that reads a number, where tensors have no values.
        self.told = 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            # transformers asks whether a mask is all ones.
            return True if args[0].dtype == torch.bool else self.told
        result, name = function(*args, **kwargs), function.overloadpacket.__name__
        own = [value for value in tree_flatten(result)[0] if isinstance(value, torch.Tensor)]
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        if name in FREE or all(tensor.device.type != self._device for tensor in (*own, *given)):
            return result
        written = sum(map(_bytes, own))
        read = written + sum(map(_bytes, given[1:])) if name in ROWS else sum(map(_bytes, given))
        moved = written + read
        launches = 1
        if name in SORTS:
            launches, moved = PASSES, moved * PASSES
        count = flop_registry.get(function.overloadpacket)
        operations = count(*args, **kwargs, out_val=result) if count is not None else 0
        self.found += Counts(launches, float(moved), float(operations))
        return result


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that lie somewhere: what is expanded lies there once."""
    there = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        there *= size if stride else min(size, 1)
    return there * tensor.element_size()


class OnPaper(TorchFunctionMode):
    """Lets code run on tensors without values: attention is one kernel, as it is on a GPU, and a host is told what it reads.

    Args:
        counting: counts attention too.
        kept: visual tokens that are kept: what `select` reads, for one sample.
        tokens: of how many.
    """

    def __init__(self, counting: Counting, kept: int = 0, tokens: int = 0) -> None:
        super().__init__()
        self._counting, self._numbers = counting, [kept, kept, tokens, 1]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function is torch.Tensor.cpu and args[0].device.type == "meta":
            return torch.ones(args[0].shape, dtype=args[0].dtype)  # the mask of tiles: everybody reads everything
        if function is torch.Tensor.tolist and args[0].device.type == "meta":
            return (self._numbers + [0] * len(args[0]))[: max(len(args[0]), len(self._numbers))]
        return function(*args, **kwargs)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **_: Any
    ) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        masks = () if attn_mask is None else (attn_mask,)
        operations = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        moved = float(sum(map(_bytes, (query, key, value, out, *masks))))
        self._counting.found += Counts(1, moved, operations)
        return out
