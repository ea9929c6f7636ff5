"""Accelerate's own test scripts, which its package ships, with DistAdamW in place of torch's AdamW and SGD."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import runpy
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch.distributed as dist
from accelerate import Accelerator, PartialState

from tests import ranks
from tests.third_party import offline, swap

Mode = Literal["accelerator.prepare", "dist_adamw.prepare", "torch's"]
MODES: tuple[Mode, ...] = ("accelerator.prepare", "dist_adamw.prepare")
PACKAGE = "accelerate.test_utils.scripts"


@dataclass(frozen=True)
class Script:
    """A script that runs on a CPU, as a module below `PACKAGE`."""

    module: str
    about: str
    function: str | None = None  # of the module, in place of the whole script
    arguments: tuple[tuple[Any, ...], ...] = ((),)  # of each run, one after the other
    is_offline: bool = False  # needs data and a model in place of the hub's
    has_restarts: bool = False  # CyclicLRWithRestarts in place of its schedule, with `dist_adamw.prepare`
    refused: str | None = None  # the error on several ranks with ``accelerator.prepare`` alone
    has_optimizer: bool = (
        True  # otherwise `dist_adamw.prepare` prepares its loaders, with an optimizer that is not used
    )

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The ways to prepare that it tests."""
        return MODES if self.has_optimizer else ("dist_adamw.prepare",)

    @property
    def name(self) -> str:
        """The name in the table."""
        return f"{self.module}.{self.function}" if self.function else self.module


_CHECKPOINT = (
    ("--output_dir=out", "--num_epochs=2"),
    ("--output_dir=out", "--num_epochs=2", "--resume_from_checkpoint=out/epoch_0"),
    ("--output_dir=out", "--num_epochs=2", "--resume_from_checkpoint=out/epoch_1"),
)
SCRIPTS = (
    Script("test_script", "loaders, samplers and random numbers; three epochs against one process"),
    Script("test_script", "three epochs against one process", "training_check"),
    Script("test_sync", "no_sync, accumulate, and the gradients that they leave"),
    # Its main() calls this on GPUs alone.
    Script(
        "test_sync",
        "gradients and lr of LambdaLR in step with one process, under all ways to split batches",
        "test_gradient_accumulation_with_opt_and_scheduler",
        arguments=tuple(itertools.product((False, True), repeat=3)),
    ),
    Script(
        "external_deps.test_checkpointing",
        "save_state and load_state: accuracy, lr and epoch after a resume",
        arguments=_CHECKPOINT,
        is_offline=True,
        has_restarts=True,
        refused="own share of the state, which was not consolidated",
    ),
    Script(
        "external_deps.test_performance",
        "a classifier with a linear schedule: lr after the first and the last update",
        arguments=(("--output_dir=.", "--num_epochs=2"),),
        is_offline=True,
    ),
    # On a CPU the whole script waits forever in join_uneven_inputs, which is for GPUs.
    *(
        Script("test_distributed_data_loop", "loaders on two ranks", name, has_optimizer=False)
        for name in ("test_default_ensures_even_batch_sizes", "test_pickle_accelerator")
    ),
    Script("external_deps.test_metrics", "gather_for_metrics", is_offline=True, has_optimizer=False),
    # Its main() calls these on GPUs alone.
    *(
        Script("external_deps.test_metrics", "gather_for_metrics", name, is_offline=True, has_optimizer=False)
        for name in (
            "test_gather_for_metrics_with_iterable_dataset",
            "test_gather_for_metrics_with_non_tensor_objects_iterable_dataset",
        )
    ),
)

# What cannot run here, and why.
CANNOT = {
    "test_cli, test_notebook, test_ops": "no optimizer, and no loader",
    "test_ddp_comm_hook": "no optimizer; DDP with device_ids, which a CPU refuses",
    "test_merge_weights": "FSDP1, which Accelerate does not use on a CPU",
    "external_deps.test_peak_memory_usage": "measures a GPU",
    "external_deps.test_pippy": "no optimizer; needs a GPU",
    "external_deps.test_zero3_integration": "no optimizer; needs NCCL and a model from the hub",
    "external_deps.test_ds_multiple_model": "needs models from the hub, and two DeepSpeed engines on GPUs",
    "external_deps.test_ds_alst_ulysses_sp": "needs a GPU and a model from the hub",
}


def run_script(index: int, mode: Mode, folder: str) -> str:
    """Run ``SCRIPTS[index]`` in ``folder`` on this rank; return what it printed. Collective."""
    script = SCRIPTS[index]
    printed, before = io.StringIO(), os.getcwd()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(folder)
        stack.enter_context(contextlib.redirect_stdout(printed))
        # The pool's process group lasts.
        stack.enter_context(mock.patch.object(PartialState, "destroy_process_group"))
        if dist.get_world_size() == 1:  # Accelerate then finds no launcher, as in a plain process
            stack.enter_context(mock.patch.dict(os.environ))
            os.environ.pop("LOCAL_RANK")
        if script.is_offline:
            stack.enter_context(offline.hub())
        if mode != "torch's" and not script.has_optimizer:
            stack.enter_context(swap.loaders_in_accelerate())
        elif mode != "torch's":
            prepares = mode == "dist_adamw.prepare"
            stack.enter_context(swap.in_accelerate(prepare=prepares, restarts=prepares and script.has_restarts))
            stack.enter_context(swap.expect_updates())
        for arguments in script.arguments:
            ranks._forget_accelerate()
            _run(script, arguments)
    return printed.getvalue()


def _run(script: Script, arguments: tuple[Any, ...]) -> None:
    name = f"{PACKAGE}.{script.module}"
    sys.modules.pop(name, None)  # it may hold the classes of another mode
    if script.function is None:
        main = sys.modules["__main__"]  # runpy replaces it
        try:
            with mock.patch.object(sys, "argv", [name, *arguments]), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the package has imported the module
                runpy.run_module(name, run_name="__main__")
        finally:
            sys.modules["__main__"] = main
        return
    Accelerator()  # as the script does first
    getattr(importlib.import_module(name), script.function)(*arguments)
