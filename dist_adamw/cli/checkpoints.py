"""``inspect``, ``import`` and ``export``: look at checkpoints, and convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dist_adamw.cli.answer import DONE, NO, Answer

# `dist_adamw.checkpoint.formats.content.Kind`, whose module imports torch.
Kind = Literal["torch", "dcp", "universal", "safetensors"]


def inspect(path: str, *, verify: bool = False) -> Answer:
    """Describe a checkpoint, and check that it is whole.

    A folder with several, of a CheckpointFolder, Accelerate, Trainer or DeepSpeed, stands for the newest whole one.

    Args:
        path: Its folder.
        verify: Read every file and compare checksums, not only the index and sizes.
    """
    from dist_adamw.checkpoint.formats.describe import describe

    found = describe(path, verify=verify)
    notes = tuple(f"passed over: {problem}" for problem in found.skipped)
    return Answer(str(found), found.data, DONE if found.problem is None else NO, notes)


def import_(
    source: str,
    path: str,
    *,
    kind: Literal["auto", "torch", "dcp", "universal", "safetensors"] = "auto",
    optimizer: str | None = None,
    names: list[str] | None = None,
    without: list[str] | None = None,
) -> Answer:
    """Convert a torch, FSDP2, DeepSpeed or safetensors checkpoint. No code in it is executed.

    Args:
        source: The file or folder.
        path: The folder to write the checkpoint to.
        kind: torch (torch.save, also of ZeroRedundancyOptimizer), dcp (FSDP2), universal (DeepSpeed) or safetensors.
        optimizer: The file with the optimizer's state dict, if that is separate.
        names: Names of the optimizer's parameters in its order, if its groups have none.
        without: Names of weights to leave out, such as the second name of a tied one.
    """
    from dist_adamw.checkpoint.formats.importing import import_checkpoint

    import_checkpoint(source, path, kind, optimizer=optimizer, names=names, without=without or ())
    return inspect(path)


def export(
    path: str, target: str, *, kind: Kind | None = None, master: bool = False, average: str | None = None
) -> Answer:
    """Write a checkpoint for torch, FSDP2, DeepSpeed or as safetensors.

    A folder with several, of a CheckpointFolder, Accelerate, Trainer or DeepSpeed, stands for the newest whole one.

    Args:
        path: The checkpoint's folder.
        target: The file or folder to write.
        kind: torch (torch.save), dcp (FSDP2), universal (DeepSpeed) or safetensors (weights alone, and the default for
            TARGET.safetensors).
        master: Write the fp32 weights if the model's have less precision.
        average: Write this average of the weights in their place, as safetensors.
    """
    from dist_adamw.checkpoint.formats.exporting import export_checkpoint
    from dist_adamw.checkpoint.formats.finding import find_checkpoint

    if Path(target).suffix == ".safetensors":
        if kind not in (None, "safetensors"):
            raise ValueError(f"{target} has the suffix of another kind, got --kind {kind}. Change one of them.")
        kind = "safetensors"
    if kind is None:
        raise ValueError("name the kind of file to write: --kind torch, dcp, universal or safetensors.")
    found = find_checkpoint(path, verify=True)
    export_checkpoint(found.path, target, kind, master=master, average=average)
    notes = tuple(f"passed over: {problem}" for problem in found.skipped)
    data = {"checkpoint": str(found.path), "written": target, "kind": kind}
    return Answer(f"{found.path} written to {target}", data, notes=notes)
