"""Read pickles without executing code in them, also where another library reads them.

Knows pickles and torch's safe load; nothing of what a checkpoint holds.

Python's ``pickle`` calls whatever a file names. Accelerate reads custom objects that way, and so do DeepSpeed and
``torch.distributed.checkpoint`` their own folders. While they read for us, ``pickle`` finds no class in this thread:
a file that needs one is refused, and says so before anything of it has run.
"""

from __future__ import annotations

import contextlib
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

# torch's own switch, for code that offers no argument of ours: Trainer, for one.
_TRUSTED_BY_ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _Here(threading.local):
    """Of this thread.

    Attributes:
        reading: What is being read for us, with `nothing_executed`; None elsewhere.
        trusted: Whether the outermost reader said that it trusts the files.
        refused: What a file asked for, since that began.
    """

    reading: str | None = None
    trusted: bool = False
    refused: str | None = None


_here = _Here()
_lock = threading.Lock()
_readers = 0  # threads that need the functions below in the place of pickle's
_unpickler, _load, _loads = pickle.Unpickler, pickle.load, pickle.loads
_find_class = pickle._Unpickler.find_class


def trusted_by_environment() -> bool:
    """Return whether the user lets torch load pickles everywhere (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1). Local."""
    return os.environ.get(_TRUSTED_BY_ENVIRONMENT, "0").lower() in ("1", "y", "yes", "true")


@contextlib.contextmanager
def nothing_executed(what: str | Path, how_to_trust: str, *, trusted: bool = False) -> Iterator[None]:
    """Have files be read in which ``pickle`` may name no class or function, in this thread. Local.

    Messages between ranks and processes go on as always: those libraries hold on to pickle's own functions.
    The outermost of several decides whether files are trusted.

    Args:
        what: What is read, for the error.
        how_to_trust: What the user can do to have the file's classes and functions called.
        trusted: Whether that was done.

    Raises:
        CheckpointError: a file names a class or function; also where the reader keeps that error to itself.
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
    """Put the functions below in the place of pickle's while some thread needs them. Local."""
    global _readers
    with _lock:
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
    """``pickle.Unpickler``, in which the threads that read for us find no class."""

    def find_class(self, module: str, name: str) -> Any:
        """As pickle's, elsewhere."""
        _check(module, name)
        return super().find_class(module, name)


def _refusing_find_class(self: Any, module: str, name: str) -> Any:
    """Of pickle's Unpickler in Python, from which other libraries derive theirs."""
    _check(module, name)
    return _find_class(self, module, name)


def _refusing_load(file: Any, **options: Any) -> Any:
    return _Refusing(file, **options).load()


def _refusing_loads(data: Any, /, **options: Any) -> Any:
    return _Refusing(io.BytesIO(data), **options).load()


def _forget_in_a_child() -> None:
    _here.reading = None


os.register_at_fork(after_in_child=_forget_in_a_child)  # a data loader's worker reads for itself


# ---------------------------------------------------------------------------------------------- files of torch.save


def _numbers_of_numpy() -> list[Any]:
    """The classes that numpy arrays and numbers are pickled with; Accelerate's list has one kind of number."""
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
    """Have torch's safe load take arrays and numbers of numpy, beside tensors and plain data. Local."""
    import _codecs

    with torch.serialization.safe_globals([_codecs.encode, *_numbers_of_numpy()]):
        yield


def load_safely(file: Any, what: str | Path, how_to_trust: str, **options: Any) -> Any:
    """Read a file of ``torch.save`` that holds tensors, numbers and plain data; nothing is executed. Local.

    Args:
        file: A path, or an open file.
        what: It, for the error.
        how_to_trust: What to do where the file holds anything else.
        options: Of ``torch.load``; ``weights_only`` is True whatever they say.

    Raises:
        CheckpointError: it holds something else, or is no such file.
    """
    others = {name: value for name, value in options.items() if name != "weights_only"}
    try:
        return torch.load(file, weights_only=True, **{"map_location": "cpu", **others})
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "TorchScript" not in str(error):
            raise
        if (asked := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise CheckpointError(
                f"{what} is no file of torch.save with tensors and plain data, or damaged."
            ) from error
        raise CheckpointError(_sentence(what, asked[1], how_to_trust)) from error


def check_safe(path: Path, how_to_trust: str) -> None:
    """Raise where `load_safely` would; tensors stay in the file. Local.

    Raises:
        CheckpointError: as `load_safely`.
    """
    with numbers_allowed():
        load_safely(path, path, how_to_trust, mmap=zipfile.is_zipfile(path))
