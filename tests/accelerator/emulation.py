"""An accelerator in name only, for machines without one: a GPU's rules about where tensors are, on the CPU.

What it is: tensors that say `cuda:0`, `cuda:1` and so on. They compute on the CPU and give the CPU's numbers. They refuse to be
mixed with tensors of the CPU or of another device, as a GPU's kernels do. Counted, by line of the source:

- host reads: the host asks for a value that is on a device, or for a shape that depends on one, and waits for it;
- copies: from the host to a device, numbers and lists that become tensors there among them;
- crossings: copies from one device to another;
- launches: operations on a device that are not mere views.

What it is not: it knows nothing of time, of memory, of streams, of kernels and what they cost or round, of dtypes that a device
lacks, of compiled or captured graphs. A launch here is an operation of PyTorch; a kernel library may need more than one for it.
What passes here can still fail on a GPU; what fails here would fail there.

    with Emulation() as device:
        to_devices(model, "cuda:0")
        model.generate(**{name: tensor.to("cuda:0") for name, tensor in inputs.items()})
    print(device.reads.total(), device.copies.most_common(3))

How: a wrapper's C++ side is on `meta`, so that no CUDA runtime is asked for, and its Python side says `cuda:N`.
`__torch_dispatch__` runs an operation on the CPU tensor inside. What PyTorch does in C++ before it dispatches (tensors made of
numbers, indexing, moving) is met one level up, by a `TorchFunctionMode`. Threads that start within are emulated as well.
"""

from __future__ import annotations

import collections
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import trim_plugin

aten, T, F = torch.ops.aten, torch.Tensor, torch.nn.functional
#: Lines are told of these packages' files, by their names.
TOLD = {str(Path(package.__file__).parent): package.__name__ for package in (trim_plugin, transformers)}
#: What only looks at a tensor in another way.
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "lift_fresh", "expand", "squeeze"),
    *("unsqueeze", "t", "transpose", "permute", "movedim", "slice", "select", "narrow", "split", "split_with_sizes"),
    *("unbind", "unfold", "diagonal"),
}

#: What the host waits for: its result is a number of the host, or has a shape that depends on values.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
FILLED = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.eye, torch.linspace, torch.rand}
FILLED |= {torch.randn, torch.randint}
LIKE = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like}
NEW = {T.new_zeros, T.new_ones, T.new_full, T.new_empty, T.new_tensor}
#: Run on the tensors inside as a whole: PyTorch would make tensors of its own on the way, which no device can be told of.
WHOLE = {
    torch.where,
    T.where,
    T.masked_fill,
    T.masked_fill_,
    torch.clamp,
    T.clamp,
    F.pad,
    F.one_hot,
    torch.matmul,
    T.matmul,
}
WHOLE |= {T.__matmul__, T.__rmatmul__, torch.einsum, F.scaled_dot_product_attention}


class Emulated(torch.Tensor):
    """A tensor on an emulated device: `inner` holds its numbers, `place` says where it is."""

    inner: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: Any) -> Emulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner, made.place = inner, a_device(place)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.place.index

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:
        return f"Emulated({self.inner!r}, {self.place})"

    def __deepcopy__(self, memo: Any) -> Emulated:
        return Emulated(self.inner.clone(), self.place)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


def a_device(place: Any) -> torch.device:
    """A device with its number."""
    place = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return torch.device("cuda", 0) if place.type == "cuda" and place.index is None else place


def _inside(values: Any) -> Any:
    return tree_map(lambda value: value.inner if isinstance(value, Emulated) else value, values)


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _together(tensors: list[torch.Tensor], name: str) -> torch.device:
    """The one device of all tensors that have dimensions: a kernel takes no others. Numbers may lie anywhere."""
    places = {str(tensor.device) for tensor in tensors if tensor.ndim > 0}
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(sorted(places))}, "
            f"in {name} at {_line()}"
        )
    return next(tensor.place for tensor in tensors if isinstance(tensor, Emulated))


def _line() -> str:
    """The innermost line of the packages that are told of."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for folder, name in TOLD.items():
            if file.startswith(folder + "/"):
                return f"{name}{file[len(folder) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _note(kind: str, name: str) -> None:
    for running in Emulation.running:
        getattr(running, kind)[f"{name} at {_line()}"] += 1


def _dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on the tensors inside, once it is sure that they are in one place."""
    tensors, name = _tensors(args, kwargs), func.overloadpacket.__name__
    ours = [tensor for tensor in tensors if isinstance(tensor, Emulated)]
    if any(tensor.is_meta for tensor in tensors):
        raise NotImplementedError(f"The emulation does not cover {func}.")
    place = ours[0].place if ours else torch.device("cpu")
    if ours and func not in MOVES:
        host_indices = (
            [one for one in args[1] if one is not None and not isinstance(one, Emulated)] if func in INDEXING else []
        )
        _together([tensor for tensor in tensors if all(tensor is not one for one in host_indices)], name)
    by_mask = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    if ours and (func in READS or (by_mask and func is aten.index.Tensor)):
        _note("reads", name)
    if kwargs.get("device") is not None:
        target, kwargs = a_device(kwargs["device"]), {**kwargs, "device": torch.device("cpu")}
        kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}
        _note_move(ours[0] if ours else tensors[0] if tensors else None, target)
        place = target
    if func is aten.copy_.default:
        _note_move(args[1], args[0].device)
        place = args[0].device
    if place.type == "cuda" and name not in VIEWS:
        _note("launches", name)
    if func is aten._fused_sdp_choice.default:
        return 0
    known = {id(tensor.inner): tensor for tensor in ours}
    made = func(*_inside(args), **_inside(kwargs))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or place.type == "cpu":
            return value
        return known.get(id(value)) if id(value) in known else Emulated(value, place)

    return made if func is aten._local_scalar_dense.default else tree_map(wrapped, made)


def _note_move(tensor: torch.Tensor | None, target: torch.device) -> None:
    """What it means that this tensor goes there."""
    if tensor is None or tensor.device == target:
        return
    if target.type == "cpu":
        _note("reads", "to cpu")
    else:
        _note("crossings" if tensor.device.type == "cuda" else "copies", f"to {target.type}")


class Emulation(TorchFunctionMode):
    """Within it everything that says "cuda" is emulated, and counted: `reads`, `copies`, `crossings`, `launches`."""

    running: list[Emulation] = []  # noqa: RUF012 - all of them, in whatever thread

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Count from here on."""
        self.reads, self.copies, self.crossings, self.launches = (collections.Counter() for _ in range(4))

    def __enter__(self) -> Emulation:
        self.running.append(self)
        self._run_thread = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            TorchFunctionMode.__enter__(self)
            try:
                self._run_thread(thread)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)

        threading.Thread.run = run
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        threading.Thread.run = self._run_thread
        self.running.remove(self)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is torch.device and isinstance(first, int):
            return a_device(first)
        if func in FROM_VALUES | FILLED | LIKE:
            place = kwargs.get("device")
            if place is None and func in LIKE | FROM_VALUES and isinstance(first, Emulated):
                place = first.place
            if place is not None and a_device(place).type == "cuda":
                return self._made(func, args, kwargs, a_device(place))
        elif func in NEW and isinstance(first, Emulated):
            place = a_device(kwargs.pop("device", None) or first.place)
            _note("copies" if func is T.new_tensor else "launches", func.__name__)
            made = func(first.inner, *_inside(args[1:]), **kwargs)
            return Emulated(made, place) if place.type == "cuda" else made
        elif func in (T.to, T.cuda, T.cpu, T.type_as):
            return self._moved(func, first, args[1:], kwargs)
        if not any(isinstance(tensor, Emulated) for tensor in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        if func in (T.tolist, T.numpy):
            _note("reads", func.__name__)
            return func(first.inner)
        if func is T.__iter__:
            return iter([Emulated(one, first.place) for one in first.inner.unbind(0)])
        if func in (T.__getitem__, T.__setitem__):
            return self._indexed(func, *args)
        if func in WHOLE:
            place = _together(_tensors(args, kwargs), func.__name__)
            if func is torch.where and len(args) == 1:
                _note("reads", "where")
            _note("launches", func.__name__)
            made = func(*_inside(args), **_inside(kwargs))
            return first if func is T.masked_fill_ else tree_map(lambda one: Emulated(one, place), made)
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any, place: torch.device) -> torch.Tensor:
        """A new tensor on a device: of the host's values, which are copied, or filled there."""
        first = args[0] if args else None
        if func in FROM_VALUES and isinstance(first, torch.Tensor):
            return self._moved(T.to, first, (), {"device": place, "dtype": kwargs.get("dtype")})
        kwargs.pop("pin_memory", None)
        made = func(*_inside(args), **{**_inside(kwargs), "device": "cpu"})
        if made.numel():  # nothing is nothing to copy
            _note("copies" if func in FROM_VALUES else "launches", func.__name__)
        return Emulated(made, place)

    @staticmethod
    def _moved(func: Any, tensor: torch.Tensor, given: Any, kwargs: Any) -> torch.Tensor:
        """`Tensor.to` and its kin."""
        target = {T.cuda: "cuda", T.cpu: "cpu"}.get(func, kwargs.get("device"))
        dtype = kwargs.get("dtype")
        for value in given:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                target, dtype = value.device, value.dtype
            elif isinstance(value, str | torch.device) or (isinstance(value, int) and not isinstance(value, bool)):
                target = value
        target = tensor.device if target is None else a_device(target)
        inner = _inside(tensor)
        moved = inner if dtype in (None, tensor.dtype) else inner.to(dtype)
        if target == tensor.device and moved is inner and not kwargs.get("copy"):
            return tensor
        if target == tensor.device and target.type == "cuda":
            _note("launches", "to")
        _note_move(tensor, target)
        moved = inner.clone() if moved is inner else moved
        return Emulated(moved, target) if target.type == "cuda" else moved

    @staticmethod
    def _indexed(func: Any, tensor: torch.Tensor, index: Any, *value: Any) -> Any:
        """Reading or writing `tensor[index]`."""
        parts = index if isinstance(index, tuple) else (index,)
        given = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim > 0]
        if not isinstance(tensor, Emulated):
            if any(isinstance(part, Emulated) for part in given):
                raise RuntimeError(f"indices should be on the same device as the indexed tensor (cpu), at {_line()}")
            return func(tensor, index, *value)
        writes = func is T.__setitem__
        if not (writes or given or any(isinstance(part, list) for part in parts)):
            return func(tensor, index)  # a view
        for part in given:
            if isinstance(part, Emulated) and part.place != tensor.place:
                raise RuntimeError(f"indices are on {part.place}, the indexed tensor on {tensor.place}, at {_line()}")
        if writes and isinstance(value[0], torch.Tensor):
            if given and value[0].ndim:
                _together([tensor, *value], "index_put_")
            _note_move(value[0], tensor.device)  # into a slice values are copied, wherever they are
        one_value = writes and not (isinstance(value[0], torch.Tensor) and value[0].numel() > 1)
        for part in parts:
            if isinstance(part, list) or (
                isinstance(part, torch.Tensor) and part.ndim and not isinstance(part, Emulated)
            ):
                _note("copies", "an index")
            elif isinstance(part, torch.Tensor) and part.dtype == torch.bool and not one_value:
                _note("reads", "an index by mask")  # with a single value it is a masked fill
        _note("launches", "index_put_" if writes else "index")
        if writes:
            tensor.inner[_inside(index)] = _inside(value[0])
            return None
        return Emulated(tensor.inner[_inside(index)], tensor.place)


def to_devices(module: torch.nn.Module, place: Any) -> torch.nn.Module:
    """Parameters and buffers of a module on an emulated device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(
                    Emulated(_inside(parameter.data), place), requires_grad=False
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Emulated(_inside(buffer), place)
    return module
