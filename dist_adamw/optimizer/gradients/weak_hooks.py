"""Register hooks that hold only weak references to the objects that they call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle


class WeakHook:
    """A method as a module hook. The module does not keep the object alive, and in a copy the hook does nothing."""

    def __init__(self, owner: Any, method: str) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._method = method

    def __call__(self, *args: Any) -> Any:
        """Call the method if the object still exists."""
        owner = self._owner() if self._owner is not None else None
        return None if owner is None else getattr(owner, self._method)(*args)

    def __deepcopy__(self, memo: Any) -> WeakHook:
        return WeakHook(None, self._method)

    def __reduce__(self) -> Any:
        return WeakHook, (None, self._method)


class _Pausable(Protocol):
    def no_sync(self) -> AbstractContextManager[None]: ...


class NoSync:
    """The ``no_sync`` of a plain module, for every optimizer attached to it. That of a copied module pauses none."""

    def __init__(self) -> None:
        self._paths: list[Callable[[], _Pausable | None]] = []

    def add(self, path: _Pausable) -> None:
        """Pause ``path`` as well."""
        self._paths = [ref for ref in self._paths if ref() not in (None, path)]
        self._paths.append(weakref.ref(path))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Only accumulate, in every optimizer."""
        with ExitStack() as stack:
            for ref in self._paths:
                if (path := ref()) is not None:
                    stack.enter_context(path.no_sync())
            yield

    def __deepcopy__(self, memo: Any) -> NoSync:
        return NoSync()

    def __reduce__(self) -> Any:
        return NoSync, ()


@functools.cache
def exclude_from_compilation(kind: type, *names: str) -> None:
    """Keep torch.compile out of the methods ``names`` of a class, which are module hooks. Local."""
    # Called when the first object is made, not at import: torch.compiler.disable imports torch._dynamo.
    for name in names:
        setattr(kind, name, torch.compiler.disable(getattr(kind, name)))  # type: ignore[no-untyped-call]


def is_in_backward() -> bool:
    """Return whether a backward pass runs in this thread: activation checkpointing calls forward there. Local."""
    return torch._C._current_graph_task_id() != -1


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Remove hooks from the modules and parameters that they are registered on."""
    for handle in list(handles):
        handle.remove()
