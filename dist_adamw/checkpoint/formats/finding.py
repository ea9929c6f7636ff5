"""Find the checkpoint that a folder stands for: a run's folder, its newest one, or a library's folder around ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dist_adamw.checkpoint.manifest import MANIFEST, damage_of
from dist_adamw.checkpoint.storage.index import INDEX, damage
from dist_adamw.errors import CheckpointError

# CheckpointFolder, Trainer, Accelerate's automatic naming, DeepSpeed.
_NUMBERED = re.compile(r"(?:sample-|checkpoint-|checkpoint_|global_step)([0-9]+)")
_OURS = "dist_adamw*"  # in a folder of save_state
_DEEPSPEED = ("*_optim_states.pt", "*/*_optim_states.pt")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint.

    Attributes:
        path: Its folder, which has the index.
        skipped: What is wrong with newer ones that were passed over.
        manifest: The folder around it whose manifest has its other files; None if there is none.
        is_checked: Whether it was found whole.
    """

    path: Path
    skipped: tuple[str, ...] = ()
    manifest: Path | None = None
    is_checked: bool = False

    def damage(self, *, verify: bool) -> str | None:
        """Return what is wrong with it, as a sentence; None if it is whole. Local.

        Args:
            verify: Read all bytes and compare checksums, not only the index and sizes.
        """
        if self.manifest is not None:
            return damage_of(self.manifest, sizes_only=not verify)
        return damage(self.path, sizes_only=not verify)


def find_checkpoint(path: str | Path, *, verify: bool = False) -> Found:
    """Return the checkpoint in a folder: itself, or the newest whole one of a run. Local.

    Known are a checkpoint, the folder of a `CheckpointFolder`, of ``save_state``, of Accelerate's project, of Trainer's
    ``output_dir``, of DeepSpeed (a file ``latest`` or folders ``global_step<N>``), and those with a folder
    ``checkpoints`` in them.

    Args:
        path: The folder.
        verify: Whether a checkpoint of several is whole if its bytes have their checksums; False: if files have their
            sizes. With one checkpoint there is no choice, and it is returned whether it is whole or not.

    Raises:
        CheckpointError: there is none, all of several are damaged, or it holds several of one save.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: no such folder.")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file, and a checkpoint is a folder. Pass the folder it is in; convert a file of another "
            "library with `dist-adamw import`."
        )
    candidates = list(_candidates(path, None, depth=4))
    skipped: list[str] = []
    if len(candidates) == 1:
        return candidates[0]
    for found in candidates:
        if (problem := found.damage(verify=verify)) is None:
            return replace(found, skipped=tuple(skipped), is_checked=True)
        skipped.append(problem)
    if skipped:
        raise CheckpointError(f"{path} has {len(skipped)} checkpoints, and none is whole. The newest: {skipped[0]}")
    raise CheckpointError(_nothing_in(path))


def _candidates(path: Path, manifest: Path | None, depth: int) -> Iterator[Found]:
    """Yield the checkpoints in a folder, those that are preferred first."""
    if depth == 0:
        return
    if (path / MANIFEST).is_file():
        manifest = path
    if (path / INDEX).is_file():
        yield Found(path, manifest=manifest)
        return
    ours = sorted(folder for folder in path.glob(_OURS) if (folder / INDEX).is_file())
    if len(ours) > 1:
        raise CheckpointError(
            f"{path} has the checkpoints of {len(ours)} models: {', '.join(folder.name for folder in ours)}. Pass one "
            f"of them, such as {ours[0]}."
        )
    if ours:
        yield Found(ours[0], manifest=manifest)
        return
    for child in _children(path):
        yield from _candidates(child, manifest, depth - 1)


def _children(path: Path) -> Iterator[Path]:
    """Yield the folder that DeepSpeed's ``latest`` names, numbered ones, newest first, and then ``checkpoints``."""
    numbered = []
    for child in path.iterdir():
        match = _NUMBERED.fullmatch(child.name)
        if match and child.is_dir():
            numbered.append((int(match[1]), child))
    newest_first = [child for _, child in sorted(numbered, reverse=True)]
    # A CheckpointFolder has such a file too, for other tools, and goes by the names of its folders.
    if not any(child.name.startswith("sample-") for child in newest_first):
        named = _latest(path)
        newest_first = [*named, *(child for child in newest_first if child not in named)]
    yield from newest_first
    if (path / "checkpoints").is_dir():
        yield path / "checkpoints"


def _latest(path: Path) -> list[Path]:
    try:
        with (path / "latest").open() as file:
            name = file.read(256).strip()
    except (OSError, ValueError):
        return []
    is_inside = name not in ("", ".", "..") and Path(name).name == name
    return [path / name] if is_inside and (path / name).is_dir() else []


def _nothing_in(path: Path) -> str:
    for folder in (path, *_children(path)):
        if (folder / ".metadata").exists():
            return f"{folder} is a folder of torch.distributed.checkpoint. Convert it with `dist-adamw import`."
        if any(any(folder.glob(pattern)) for pattern in _DEEPSPEED):
            return (
                f"{folder} was written by DeepSpeed itself, as pickles. Convert it with DeepSpeed's ds_to_universal, "
                "and the result with `dist-adamw import`."
            )
    return (
        f"{path} has no checkpoint of dist_adamw: no {INDEX}, which is written last, neither in it nor in its folders "
        "sample-N, checkpoint-N, checkpoint_N, global_stepN or checkpoints."
    )
