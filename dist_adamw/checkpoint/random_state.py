"""Save and restore the state of Python's, numpy's and torch's random generators, as JSON in a tensor of bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dist_adamw.checkpoint.storage.files import read_whole
from dist_adamw.checkpoint.storage.index import Index
from dist_adamw.errors import CheckpointError
from dist_adamw.ranks import collectives

RNG = "rng"
_LARGEST = 1 << 20  # bytes; a real one has some tens of thousands


def current_random_state() -> Tensor:
    """Return the state of Python's, numpy's (if installed), torch's and this rank's device's generators. Local."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": _hex(torch.get_rng_state())}
    try:
        import numpy as np
    except ImportError:
        pass
    else:
        legacy: Any = np.random.get_state()
        state["numpy"] = [legacy[0], legacy[1].tolist(), *legacy[2:]]
    # Asking an uninitialized CUDA for its state would create a context, which takes memory.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def restore_random_state(index: Index) -> str:
    """Restore this rank's random state, or derive one from the saved states if it had none. Local.

    Raises:
        CheckpointError: the saved data is no random state. Nothing has been changed then.
    """
    return random_state_of(index)()


def random_state_of(index: Index) -> Callable[[], str]:
    """Check the saved random state; return the function that restores it. Local."""
    rank, before = collectives.rank(), index.about["world_size"]
    if f"{RNG}.0" not in index.tensors:
        return lambda: "left alone"
    key = f"{RNG}.{rank % before}"
    text = _text(index, key)
    # If all ranks drew the same numbers, a new rank draws them too.
    known = rank < before or (before > 1 and all(_text(index, f"{RNG}.{other}") == text for other in range(before)))
    try:
        state = json.loads(text)
        put = [*_generators(state)]
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{index.folder} is damaged: {key} is no random state: {error}.") from error

    def restore() -> str:
        for one in put:
            one()
        if known:
            return "restored"
        # The state that it shares with another rank, plus its own number: repeatable, and different on every rank.
        seed = (torch.initial_seed() * 1_000_003 + random.getrandbits(32) + rank) % (1 << 63)
        random.seed(seed)
        torch.manual_seed(seed)
        if "numpy" in state:
            import numpy as np

            np.random.seed(seed % (1 << 32))
        return "seeded again, since there was no such rank"

    return restore


def _text(index: Index, key: str) -> bytes:
    saved = index.tensors.get(key)
    if saved is None or saved.dtype != torch.uint8 or len(saved.shape) != 1 or saved.shape[0] > _LARGEST:
        raise CheckpointError(f"{index.folder} is damaged: {key} is no random state.")
    return bytes(read_whole(index, key).tolist())


def _generators(state: Any) -> Iterator[Callable[[], object]]:
    """Yield functions that set each generator, after a trial on a scratch generator. Local."""
    version, numbers, gauss = state["python"]
    python = (version, tuple(numbers), gauss)
    tried = random.Random()
    tried.setstate(python)
    if tried.getstate() != python or not (gauss is None or type(gauss) is float):  # setstate truncates
        raise ValueError("of Python's random")
    yield lambda: random.setstate(python)
    cpu = _unhex(state["torch"])
    torch.Generator().set_state(cpu)
    yield lambda: torch.set_rng_state(cpu)
    if "numpy" in state:
        import numpy as np

        kind, keys, place, *rest = state["numpy"]
        legacy: Any = (kind, np.array(keys, dtype=np.uint32), place, *rest)
        np.random.RandomState().set_state(legacy)
        if not 0 <= place <= len(keys):  # numpy does not check, and would read past the end of the keys
            raise ValueError(f"place {place} of {len(keys)}")
        yield lambda: np.random.set_state(legacy)
    if "cuda" in state and torch.cuda.is_available():
        device = _unhex(state["cuda"])
        torch.Generator("cuda").set_state(device)
        yield lambda: torch.cuda.set_rng_state(device)


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
