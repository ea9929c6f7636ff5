"""Store the state of random generators as a tensor of text.

Knows Python's, numpy's and torch's generators, and the index of a checkpoint.
"""

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
_LARGEST = 1 << 20  # bytes; what is written has some tens of thousands


def current_random_state() -> Tensor:
    """Of Python, numpy if it is there, torch and this rank's device; as text in a tensor. Local."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": _hex(torch.get_rng_state())}
    try:
        import numpy as np
    except ImportError:
        pass
    else:
        legacy: Any = np.random.get_state()
        state["numpy"] = [legacy[0], legacy[1].tolist(), *legacy[2:]]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def restore_random_state(index: Index) -> str:
    """Give this rank the random state that it had, or one that follows from those that were. Local.

    Raises:
        CheckpointError: what was saved is none. Nothing has been changed then.
    """
    return random_state_of(index)()


def random_state_of(index: Index) -> Callable[[], str]:
    """Return a function that restores the saved random state, which has been checked. Local."""
    rank, before = collectives.rank(), index.about["world_size"]
    if f"{RNG}.0" not in index.tensors:
        return lambda: "left alone"
    key = f"{RNG}.{rank % before}"
    text = _text(index, key)
    # Where all ranks drew the same numbers, a new one does so too.
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
        seed = (torch.initial_seed() * 1_000_003 + random.getrandbits(32) + rank) % (1 << 63)
        random.seed(seed)
        torch.manual_seed(seed)
        if "numpy" in state:
            import numpy as np

            np.random.seed(seed % (1 << 32))
        return "seeded anew, since there was no such rank"

    return restore


def _text(index: Index, key: str) -> bytes:
    saved = index.tensors.get(key)
    if saved is None or saved.dtype != torch.uint8 or len(saved.shape) != 1 or saved.shape[0] > _LARGEST:
        raise CheckpointError(f"{index.folder} is damaged: {key} is no random state.")
    return bytes(read_whole(index, key).tolist())


def _generators(state: Any) -> Iterator[Callable[[], object]]:
    """Return functions that set each generator; each has been tried on another generator. Local."""
    version, numbers, gauss = state["python"]
    python = (version, tuple(numbers), gauss)
    tried = random.Random()
    tried.setstate(python)
    if tried.getstate() != python or not (gauss is None or type(gauss) is float):  # it cuts numbers off
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
        if not 0 <= place <= len(keys):  # numpy does not look, and would read beyond the end of the keys
            raise ValueError(f"place {place} of {len(keys)}")
        yield lambda: np.random.set_state(legacy)
    if "cuda" in state and torch.cuda.is_available():
        device = _unhex(state["cuda"])
        torch.Generator("cuda").set_state(device)
        yield lambda: torch.cuda.set_rng_state(device)


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
