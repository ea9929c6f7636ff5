"""Read pickles without executing code in them, even when another library does the reading.

Python's ``pickle`` calls whatever a file names. Accelerate reads custom objects that way, and DeepSpeed and
``torch.distributed.checkpoint`` read their own folders so. While they read for us, ``pickle`` finds no class in this
thread: a file that names one is refused before any of its code runs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dist_adamw.errors import CheckpointError

# torch's own switch, for callers such as Trainer that offer no argument for this.
_TRUSTED_BY_ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _Here(threading.local):
    """The state of this thread.

    Attributes:
        reading: The file or folder being read under `nothing_executed`; None otherwise.
        trusted: Whether the outermost reader trusts the files.
        refused: The class or function that a file named since then.
    """

    reading: str | None = None
    trusted: bool = False
    refused: str | None = None


_here = _Here()
_lock = threading.Lock()
_readers = 0  # threads that need pickle's functions replaced by the ones below
# The originals, taken before anything is replaced.
_unpickler, _load, _loads = pickle.Unpickler, pickle.load, pickle.loads
_find_class = pickle._Unpickler.find_class


def trusted_by_environment() -> bool:
    """Return whether the user lets torch load pickles everywhere (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1). Local."""
    return os.environ.get(_TRUSTED_BY_ENVIRONMENT, "0").lower() in ("1", "y", "yes", "true")


@contextlib.contextmanager
def nothing_executed(what: str | Path, how_to_trust: str, *, trusted: bool = False) -> Iterator[None]:
    """Refuse pickles that name a class or function, in this thread. Local.

    Messages between ranks and processes are unaffected: those libraries hold references to pickle's own functions.
    If nested, the outermost decides whether files are trusted.

    Args:
        what: The file or folder, for the error.
        how_to_trust: How the user can allow the file's classes and functions, for the error.
        trusted: Whether the user did.

    Raises:
        CheckpointError: a file names a class or function, even if the reader swallowed that error.
    """
    if _here.reading is not None or _here.trusted:
        yield
        return
    trusted = trusted or trusted_by_environment()
    if trusted:
        _here.trusted = True
        try:
            yield
        finally:
            _here.trusted = False
        return
    _watch_forks()
    _here.reading, _here.refused = f"{what}", None
    _install(1)
    try:
        yield
    except Exception as error:
        if _here.refused is None or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_sentence(what, _here.refused, how_to_trust)) from error
    else:
        if _here.refused is not None:
            raise CheckpointError(_sentence(what, _here.refused, how_to_trust))
    finally:
        _install(-1)
        _here.reading = None


def _sentence(what: str | Path, asked_for: str, how_to_trust: str) -> str:
    return (
        f"{what} asks for {asked_for}, which is neither tensors nor plain data, and nothing is executed. {how_to_trust}"
    )


def _install(readers: int) -> None:
    """Replace pickle's functions by the ones below while some thread needs them. Local."""
    global _readers
    with _lock:  # pickle's attributes are the process's, and several threads may read
        _readers += readers
        on = _readers > 0
        pickle.Unpickler = _Refusing if on else _unpickler  # type: ignore[misc]
        pickle.load, pickle.loads = (_refusing_load, _refusing_loads) if on else (_load, _loads)
        pickle._Unpickler.find_class = _refusing_find_class if on else _find_class  # type: ignore[method-assign]


def _check(module: str, name: str) -> None:
    if _here.reading is not None:
        _here.refused = f"{module}.{name}"
        raise pickle.UnpicklingError(f"{_here.reading} asks for {module}.{name}, and nothing is executed")


class _Refusing(_unpickler):  # type: ignore[misc,valid-type]
    """``pickle.Unpickler`` that finds no class in threads under `nothing_executed`."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse, or do as pickle in other threads."""
        _check(module, name)
        return super().find_class(module, name)


def _refusing_find_class(self: Any, module: str, name: str) -> Any:
    """Stand in for the method of pickle's pure-Python Unpickler, which other libraries subclass."""
    _check(module, name)
    return _find_class(self, module, name)


def _refusing_load(file: Any, **options: Any) -> Any:
    return _Refusing(file, **options).load()


def _refusing_loads(data: Any, /, **options: Any) -> Any:
    return _Refusing(io.BytesIO(data), **options).load()


def _forget_in_a_child() -> None:
    _here.reading = None


@functools.cache
def _watch_forks() -> None:
    """Let a loader's worker that is forked during a load unpickle the user's own objects. Once, at the first load."""
    os.register_at_fork(after_in_child=_forget_in_a_child)


# ---------------------------------------------------------------------------------------------- files of torch.save


def _numbers_of_numpy() -> list[Any]:
    """Return the classes in pickles of numpy arrays and numbers; Accelerate allows only one type of number."""
    try:
        import numpy as np
        from numpy import dtypes
    except ImportError:
        return []
    core = getattr(np, "_core", None) or np.core
    kinds = [kind for name, kind in vars(dtypes).items() if name.endswith("DType") and isinstance(kind, type)]
    return [np.dtype, np.ndarray, core.multiarray._reconstruct, core.multiarray.scalar, *kinds]


@contextlib.contextmanager
def numbers_allowed() -> Iterator[None]:
    """Let torch's safe load accept numpy arrays and numbers too. Local."""
    import _codecs

    with torch.serialization.safe_globals([_codecs.encode, *_numbers_of_numpy()]):
        yield


def load_safely(file: Any, what: str | Path, how_to_trust: str, **options: Any) -> Any:
    """Read a file of ``torch.save`` that holds tensors, numbers and plain data; nothing is executed. Local.

    Args:
        file: A path, or an open file.
        what: Its name, for the error.
        how_to_trust: The remedy if the file holds anything else, for the error.
        options: Of ``torch.load``; ``weights_only`` is always True.

    Raises:
        CheckpointError: it holds something else, or is no such file.
    """
    others = {name: value for name, value in options.items() if name != "weights_only"}
    try:
        return torch.load(file, weights_only=True, **{"map_location": "cpu", **others})
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        # A RuntimeError about TorchScript means a file of another kind; others are not about the contents.
        if isinstance(error, RuntimeError) and "TorchScript" not in str(error):
            raise
        if (asked := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise CheckpointError(f"{what} is damaged, or is no torch.save file of tensors and plain data.") from error
        raise CheckpointError(_sentence(what, asked[1], how_to_trust)) from error


def check_safe(path: Path, how_to_trust: str) -> None:
    """Raise if `load_safely` would; tensors stay in the file. Local.

    Raises:
        CheckpointError: see `load_safely`.
    """
    with numbers_allowed():
        load_safely(path, path, how_to_trust, mmap=zipfile.is_zipfile(path))
