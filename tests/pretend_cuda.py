"""Tensors that say they are on a CUDA device, with their memory on the host: what would the host launch and wait for?

Inside `pretending()`, ``torch.zeros(8, device="cuda:0")`` and the like return such tensors; every operation computes on
the host, and is noted in the `Notes`: kernels, and whatever would make the host wait for the device. Python's indexing
and data_ptr are handled here too, since torch without CUDA refuses them. Works with a real or a fake process group.
"""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_CUDA, _META = 1, 14  # c10::DeviceType
aten = torch.ops.aten
_READS_RESULT = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero", "_local_scalar_dense"}
_NO_KERNEL = {
    "detach",
    "alias",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
}


@dataclass
class Notes:
    """What happened since `clear`.

    Attributes:
        kernels: Operations on the device, by name. One for lists of tensors may be several launches.
        waits: What makes the host wait for everything queued so far.
        event_waits: Waits for an event, which was recorded earlier.
        events: The devices of the streams that events were recorded on.
        by_stream: Operations by the stream of the first device that they run on.
        order: Pairs of streams of which the first waited for the second.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    event_waits: int = 0
    events: list[torch.device] = field(default_factory=list)
    by_stream: dict[Stream, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    order: list[tuple[Stream, Stream]] = field(default_factory=list)

    def clear(self) -> None:
        self.kernels.clear()
        self.waits.clear()
        self.event_waits = 0
        self.events.clear()
        self.by_stream.clear()
        self.order.clear()

    def launched(self, name: str) -> None:
        self.kernels[name] += 1
        self.by_stream[current_stream()][name] += 1

    def copied(self, source: Tensor, target: Tensor | None, *, non_blocking: bool) -> None:
        """Note a copy; ``target`` None is new pageable memory on the host."""
        there = isinstance(source, CudaTensor), isinstance(target, CudaTensor)
        if there == (False, False):
            return
        self.launched("copy")
        host = target if there[0] else source
        if there != (True, True) and not (non_blocking and getattr(host, "is_pretended_pinned", False)):
            self.waits["copy to the host" if there[0] else "copy from pageable memory"] += 1


notes = Notes()


class CudaTensor(Tensor):
    """A tensor whose device is CUDA, and whose values are ``host``."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device, requires_grad: bool = False) -> CudaTensor:
        made: CudaTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.host}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        special = _SPECIAL.get(func)
        if special is not None and isinstance(args[0], CudaTensor):
            return special(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # the inherited method would make results CudaTensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.data_ptr: lambda tensor: tensor.host.data_ptr(),
    Tensor.tolist: lambda tensor: tensor.cpu().tolist(),
}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute ``func`` on the host, and note what a device would do."""
    name = func._schema.name.partition("::")[2]
    wrappers = {id(t.host): t for t in tree_leaves((args, kwargs)) if isinstance(t, CudaTensor)}
    devices = [t.device for t in wrappers.values()]
    wanted = kwargs.get("device")
    target: torch.device | None = devices[0] if devices else None
    if wanted is not None:
        target = torch.device(wanted) if torch.device(wanted).type == "cuda" else None
        kwargs["device"] = torch.device("cpu")
    if name not in ("copy_", "_to_copy"):
        _check_devices(name, args, kwargs)
    _note(func, name, args, kwargs, to_host=wanted is not None and target is None)
    on_host = tree_map(lambda x: x.host if isinstance(x, CudaTensor) else x, (args, kwargs))
    result = func(*on_host[0], **on_host[1])

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, CudaTensor) or target is None:
            return x
        if id(x) in wrappers:
            return wrappers[id(x)]
        return x if name == "copy_" else CudaTensor(x, target)

    return tree_map(wrapped, result)


def _check_devices(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise, as CUDA does, if one operation has tensors on several devices."""
    values = [*args, *kwargs.values()]
    # Each list of a foreach function may mix devices, but a tensor for all of its elements may not be elsewhere.
    if name.startswith("_foreach") and not any(isinstance(v, CudaTensor) for v in values):
        return
    found = {t.device for t in tree_leaves(values) if isinstance(t, CudaTensor)}
    if len(found) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {sorted(map(str, found))}")


def _note(func: Any, name: str, args: Any, kwargs: dict[str, Any], *, to_host: bool) -> None:
    if name == "copy_":
        notes.copied(args[1], args[0], non_blocking=bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
    elif name == "_to_copy" and to_host:
        notes.copied(args[0], None, non_blocking=bool(kwargs.get("non_blocking")))
    elif name in _READS_RESULT:
        notes.waits[name] += 1
        notes.launched(name)
    elif not (func.is_view or name in _NO_KERNEL):
        notes.launched(name)


_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "randn", "zeros_like", "empty_like")


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that makes tensors, for which CUDA need not be there."""

    def make(*args: Any, **kwargs: Any) -> Any:
        is_pinned = kwargs.pop("pin_memory", False)
        device = _cuda(kwargs.get("device"))
        made = function(*args, **kwargs) if device is None else _made(function, args, kwargs, device)
        if is_pinned:
            made.is_pretended_pinned = True
        return made

    return make


class _Moves(TorchFunctionMode):
    """Move tensors "to CUDA" and back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _moved(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cuda(device: Any) -> torch.device | None:
    if not isinstance(device, (str, torch.device)) or torch.device(device).type != "cuda":
        return None
    return torch.device("cuda", torch.device(device).index or 0)


def _made(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """Return the result of a function with ``device``, which makes a tensor there."""
    like = next((a for a in args if isinstance(a, CudaTensor)), None)
    if like is not None:  # zeros_like and the like; on the device of its argument
        del kwargs["device"]
        return _on(func(*args, **kwargs), device)
    made = func(*args, **kwargs | {"device": "cpu"})
    name = func.__name__
    notes.kernels[name] += name not in ("empty", "empty_like", "empty_strided")
    if name in ("tensor", "as_tensor"):
        notes.waits[f"torch.{name}"] += 1
    return CudaTensor(made.detach(), device, made.requires_grad)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else _moved(Tensor.to, tensor, device)


def _moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``tensor.to(...)``."""
    if func is Tensor.cuda:
        args, kwargs = (args or ("cuda",)), kwargs
    if func is Tensor.cpu:
        args = ("cpu",)
    places = [kwargs.pop("device", None), *(a for a in args if isinstance(a, (str, torch.device, Tensor)))]
    place = next((p for p in places if p is not None), tensor.device)
    dtypes = [kwargs.pop("dtype", None), *(a for a in args if isinstance(a, torch.dtype))]
    if isinstance(place, Tensor):
        dtypes.append(place.dtype)
        place = place.device
    dtype = next((d for d in dtypes if d is not None), tensor.dtype)
    device, source = _cuda(place), _cuda(tensor.device)
    if device == source and (device is not None or torch.device(place).type == tensor.device.type):
        return aten._to_copy(tensor, dtype=dtype) if dtype != tensor.dtype or kwargs.get("copy") else tensor
    notes.copied(tensor, None if device is None else CudaTensor(tensor.new_empty(0), device)
                 if source is None else tensor, non_blocking=bool(kwargs.get("non_blocking")))  # fmt: skip
    host = tensor.host if isinstance(tensor, CudaTensor) else tensor
    copy = host.detach().to(dtype, copy=True)
    return copy if device is None else CudaTensor(copy, device)


class Stream:
    """A stream of work.

    Attributes:
        behind: For each stream, how much of its work comes before all that is queued on this one from now on.
    """

    def __init__(self, device: Any = None) -> None:
        self.device = _cuda(device) or torch.device("cuda:0")
        self.behind: Counter[Stream] = Counter()

    def work(self) -> tuple[Stream, int]:
        """Queue some work; return what `Stream.is_behind` needs."""
        self.behind[self] += 1
        return self, self.behind[self]

    def is_behind(self, work: tuple[Stream, int]) -> bool:
        return self.behind[work[0]] >= work[1]

    def wait_event(self, event: _Event) -> None:
        self.behind |= event.behind  # the larger of each
        notes.order.append((self, event.stream))

    def wait_stream(self, other: Stream) -> None:
        event = _Event()
        event.behind, event.stream = Counter(other.behind), other
        self.wait_event(event)


class _Event:
    stream: Stream

    def __init__(self, **_: Any) -> None:
        self.behind: Counter[Stream] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self.stream, self.behind = stream, Counter(stream.behind)
        notes.events.append(stream.device)

    def synchronize(self) -> None:
        notes.event_waits += 1


_main: dict[torch.device, Stream] = {}
_entered: list[Stream] = []


def current_stream(device: Any = None) -> Stream:
    """Return the stream that was entered last on ``device``, or its first one."""
    place = _cuda(device) or torch.device("cuda:0")
    for stream in reversed(_entered):
        if stream.device == place:
            return stream
    return _main.setdefault(place, Stream(place))


@contextmanager
def _entering(stream: Stream) -> Iterator[None]:
    _entered.append(stream)
    try:
        yield
    finally:
        _entered.pop()


def _register_guard() -> None:
    """Give indexing and autograd a guard for CUDA devices that does nothing: the one of meta tensors.

    A torch that is built for CUDA has a guard, which fails where there is no driver.
    """
    library = Path(torch.__file__).parent / "lib/libc10.so"
    registry = (ctypes.c_void_p * 20).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    registry[_CUDA] = registry[_META]


class Model(torch.nn.Module):
    """Parameters "on CUDA" whose gradients arrive in a backward pass, one after the other, the last parameter first.

    Autograd needs a real device for tensors on CUDA, so the pass is that of a number on the host.
    """

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(params)
        self.without_gradient: set[int] = set()  # indices
        self.streams: dict[int, Stream] = {}  # by index, that on which the gradient is written
        self.written: dict[int, tuple[Stream, int]] = {}  # by id of the parameter

    def forward(self) -> Tensor:
        made: Tensor = _Arrive.apply(torch.zeros((), requires_grad=True), self)
        return made


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, model: Model) -> Tensor:
        ctx.model = model
        return number.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        for i, param in reversed(list(enumerate(ctx.model.weights))):
            if i in ctx.model.without_gradient:
                continue
            with _entering(ctx.model.streams.get(i) or current_stream(param.device)):
                param.grad = CudaTensor(torch.full_like(param.host, 0.5), param.device)
                ctx.model.written[id(param)] = current_stream(param.device).work()
                for hook in (param._post_accumulate_grad_hooks or {}).values():
                    hook(param)
        return None, None


@contextmanager
def pretending() -> Iterator[Notes]:
    """Pretend that CUDA devices are there, and the Triton kernel with them.

    For a process of its own: what it registers stays.
    """
    from dist_adamw.optimizer.kernels import triton as kernel

    def launched(table: Any, *state: Any, **options: Any) -> None:
        _check_devices("Triton's update", [table.rows, *state], options)
        notes.launched("Triton's update")

    _register_guard()
    replaced: list[Any] = [
        patch.object(torch.cuda, "Event", _Event),
        patch.object(torch.cuda, "Stream", Stream),
        patch.object(torch.cuda, "current_stream", current_stream),
        patch.object(torch.cuda, "stream", _entering),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        patch.object(kernel, "available", lambda device: True),
        patch.object(kernel, "flat_adamw_update_", launched),
        *(patch.object(torch, name, _factory(getattr(torch, name))) for name in _FACTORIES),
    ]
    notes.clear()
    with ExitStack() as stack:
        for one in (*replaced, _Moves()):
            stack.enter_context(one)
        yield notes
