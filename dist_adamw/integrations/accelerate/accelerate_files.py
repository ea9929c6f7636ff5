"""Read Accelerate's own files in a folder of ``save_state`` without executing code in them.

The names are those of Accelerate 1.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_adamw.checkpoint.unpickling import (
    check_safe,
    load_safely,
    nothing_executed,
    numbers_allowed,
    trusted_by_environment,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

_HOW_TO_TRUST = (
    'If you trust the folder, pass load_state(..., load_kwargs={"weights_only": False}), or name the classes with '
    "torch.serialization.add_safe_globals."
)


def is_trusted(load_kwargs: Any) -> bool:
    """Return whether the user allows code in the files, by ``weights_only=False`` or the environment. Local."""
    return (isinstance(load_kwargs, dict) and load_kwargs.get("weights_only") is False) or trusted_by_environment()


def check_pickles(accelerator: Accelerator, folder: Path) -> None:
    """Raise if a pickle that Accelerate is about to read would execute code. Local; nothing is changed.

    Raises:
        CheckpointError: names the file, and the class or function that it asks for.
    """
    for name in _pickles(accelerator, folder):
        if (path := folder / name).is_file():
            check_safe(path, _HOW_TO_TRUST)


def _pickles(accelerator: Accelerator, folder: Path) -> Iterator[str]:
    """Yield names of the files that ``load_accelerator_state`` unpickles for Accelerate's current objects."""

    def numbered(stem: str, objects: list[Any]) -> Iterator[str]:
        yield from (f"{stem}.bin" if i == 0 else f"{stem}_{i}.bin" for i in range(len(objects)))

    for name in numbered("pytorch_model", accelerator._models):
        safe = name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        if not (folder / safe).exists():
            yield name
    yield from numbered("optimizer", accelerator._optimizers)
    yield from numbered("scheduler", accelerator._schedulers)
    yield from numbered("sampler", accelerator._dataloaders)
    yield from numbered("dl_state_dict", accelerator._dataloaders)
    if accelerator.scaler is not None:
        yield "scaler.pt"
    yield f"random_states_{accelerator.process_index}.pkl"
    yield from (f"custom_checkpoint_{i}.pkl" for i in range(len(accelerator._custom_objects)))


@contextlib.contextmanager
def reading_safely(folder: Path | str, load_kwargs: Any) -> Iterator[None]:
    """Keep Accelerate from executing code in a folder that it reads, unless the user trusts the folder. Local.

    Raises:
        CheckpointError: a file names a class or function.
    """
    if is_trusted(load_kwargs):
        with nothing_executed(folder, _HOW_TO_TRUST, trusted=True):
            yield
        return
    import accelerate.checkpointing as theirs

    before = theirs.load

    def load(f: Any, map_location: Any = None, **options: Any) -> Any:
        # Accelerate passes weights_only=False for custom objects; load_safely overrides it.
        with numbers_allowed():
            return load_safely(f, str(f), _HOW_TO_TRUST, **{**options, "map_location": map_location})

    theirs.load = load
    try:
        with nothing_executed(folder, _HOW_TO_TRUST):
            yield
    finally:
        theirs.load = before
