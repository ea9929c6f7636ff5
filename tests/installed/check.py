"""Check an installed package: names, command, training and checkpoints on 1 and 2 ranks, and missing extras.

    PYTHON tests/installed/check.py

PYTHON is of an environment that has the wheel, with or without its extras, and not this repository. It takes half a
minute, needs no network and no pytest, and exits with status 1 at the first thing that is wrong.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).with_name("dist-adamw")  # as installed next to this interpreter
BATCH, EPOCH, UPDATES = 8, 32, 8
RECIPE = f"""
batch:
  size: {BATCH}
scheduler:
  epoch_size: {EPOCH}
  restart_period: 1
"""
EXTRAS = ("deepspeed", "lightning", "matplotlib", "shtab", "tensorboard", "tqdm", "transformers", "triton", "uniplot")


def main() -> None:
    """Run every check, and print one line for each."""
    with tempfile.TemporaryDirectory() as folder:
        check_place_and_version()
        check_names()
        check_commands(Path(folder))
        check_missing_extras(Path(folder))
        for ranks in (1, 2):
            check_training(Path(folder) / f"{ranks}", ranks)
    print("all checks passed")


def check_place_and_version() -> None:
    """The package is the installed one, is typed, and has one version."""
    folder = Path(dist_adamw.__file__).resolve().parent
    expect(REPOSITORY not in folder.parents, f"{folder} is in this repository: install the wheel, and leave PYTHONPATH")
    expect((folder / "py.typed").is_file(), f"{folder} has no py.typed")
    version = importlib.metadata.version("dist_adamw")
    expect(version == dist_adamw.__version__, f"the metadata has version {version}, not {dist_adamw.__version__}")
    found = [name for name in EXTRAS if is_installed(name)]
    print(f"dist_adamw {version}, Python {sys.version.split()[0]}, torch {torch.__version__}, {found or 'no extras'}")


def check_names() -> None:
    """Every public name can be imported."""
    for name in dir(dist_adamw):
        expect(getattr(dist_adamw, name) is not None, name)
    print(f"names: {len(dir(dist_adamw))}")


def check_commands(folder: Path, run: Callable[[Sequence[str]], str] | None = None) -> set[str]:
    """Every verb of the command runs; those that read files read what this function wrote. Return the verbs."""
    run = run_command if run is None else run
    model, optimizer, scheduler = objects()
    train(model, optimizer, scheduler, range(2))
    saved, exported, again = folder / "saved", folder / "torch.pt", folder / "again"
    dist_adamw.save(saved, model, optimizer, scheduler)
    log = dist_adamw.RunLog(folder / "run", model, optimizer)
    train(model, optimizer, scheduler, range(2, 4))
    log.close()
    shutil.copytree(folder / "run", folder / "same")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    runs: list[tuple[Sequence[str], str]] = [
        (("preview", str(recipe), "--total_samples=96"), "training ends at sample 96"),
        (("plan", "1e6", str(recipe), "--ranks=1,2"), "2 ranks"),
        (("check", str(recipe)), "no problems"),
        (("schema",), "dist_adamw recipe"),
        (
            ("batch", "--size=32", "--micro_batch_size=8", "--data_parallel_size=2"),
            "32 samples = 8 per micro-batch x 2 accumulation steps",
        ),
        (("inspect", str(saved)), "samples"),
        (("export", str(saved), str(exported), "--kind=torch"), "written to"),
        (("import", str(exported), str(again)), "files have their sizes"),
        (("diff", str(folder / "run"), str(folder / "same")), "compared"),
        (("lr-range", "--help"), "script"),
    ]
    if is_installed("matplotlib"):
        runs.append((("plot", str(recipe), f"--out={folder / 'recipe.svg'}"), "recipe.svg"))
    if is_installed("shtab"):
        runs.append((("completion", "bash"), "complete"))
    for arguments, word in runs:
        output = run(arguments)
        expect(word in output, f"dist-adamw {' '.join(arguments)} printed {output!r}, which has no {word!r}")
    print(f"commands: {', '.join(arguments[0] for arguments, _ in runs)}")
    return {arguments[0] for arguments, _ in runs}


def check_missing_extras(folder: Path) -> None:
    """What needs an optional library that is not installed raises one sentence that names the extra."""
    recipe = str(folder / "recipe.yaml")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    cases: list[tuple[str, str, Callable[[], object]]] = [
        ("deepspeed", "dist_adamw[deepspeed]", dist_adamw.register_deepspeed),
        ("transformers", "dist_adamw[transformers]", lambda: dist_adamw.prepare_trainer(object())),  # type: ignore[type-var]
        ("transformers", "dist_adamw[transformers]", lambda: raise_printed(("plan", str(folder)))),
        ("lightning", "dist_adamw[lightning]", lambda: dist_adamw.prepare_lightning(object())),
        ("matplotlib", "dist_adamw[tracking]", lambda: raise_printed(("plot", recipe, "--out=recipe.png"))),
        ("uniplot", "dist_adamw[terminal]", lambda: raise_printed(("plot", recipe))),
        ("shtab", "dist_adamw[completion]", lambda: raise_printed(("completion", "bash"))),
    ]
    for library, extra, call in cases:
        if is_installed(library):
            continue
        try:
            call()
        except ImportError as error:
            expect(
                extra in str(error) and "\n" not in str(error), f"without {library}: {error!r} does not name {extra}"
            )
            print(f"without {library}: {error}")
        else:
            raise SystemExit(f"without {library}: no error names {extra}")


def check_training(folder: Path, ranks: int) -> None:
    """Training on gloo that stops and resumes has the bits of training that never stopped."""
    folder.mkdir()
    spawn(_on_rank, (ranks, str(folder)), nprocs=ranks)
    hashes = {path.read_text() for path in folder.glob("weights-*")}
    expect(len(hashes) == 1, f"{ranks} ranks: the weights differ between ranks, or after a resume: {hashes}")
    print(f"training, save and resume on {ranks} ranks: {hashes.pop()[:12]}")


def _on_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    model, optimizer, scheduler = objects()
    train(model, optimizer, scheduler, range(UPDATES // 2), rank, ranks)
    dist_adamw.save(Path(folder) / "saved", model, optimizer, scheduler)
    train(model, optimizer, scheduler, range(UPDATES // 2, UPDATES), rank, ranks)
    resumed = objects()
    dist_adamw.load(Path(folder) / "saved", *resumed)
    train(*resumed, range(UPDATES // 2, UPDATES), rank, ranks)
    for name, trained in (("whole", model), ("resumed", resumed[0])):
        bits = nn.utils.parameters_to_vector(trained.parameters()).detach().view(torch.int32).tolist()
        Path(folder, f"weights-{name}-{rank}").write_text(" ".join(f"{value & 0xFFFFFFFF:08x}" for value in bits))
    dist.destroy_process_group()


def objects() -> tuple[nn.Module, DistAdamW, CyclicLRWithRestarts]:
    """Return a small model with its optimizer, attached, and its schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = DistAdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    if dist.is_initialized():
        optimizer.attach(model)
    return model, optimizer, CyclicLRWithRestarts(optimizer, BATCH, EPOCH, restart_period=1, t_mult=2)


def train(
    model: nn.Module,
    optimizer: DistAdamW,
    scheduler: CyclicLRWithRestarts,
    updates: range,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Make the updates of these numbers: each rank has its rows of the batch."""
    for update in updates:
        x: Tensor = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(update))
        nn.functional.mse_loss(model(x[rank::ranks]), x[rank::ranks, :3].sin()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def run_command(arguments: Sequence[str], status: int = 0) -> str:
    """Run the installed command; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    printed = done.stdout + done.stderr
    expect(done.returncode == status, f"dist-adamw {' '.join(arguments)}: exit status {done.returncode}\n{printed}")
    return printed


def raise_printed(arguments: Sequence[str]) -> None:
    """Run a command that must fail, and raise the sentence that it printed."""
    raise ImportError(run_command(arguments, status=2).strip().splitlines()[-1])


def is_installed(library: str) -> bool:
    """Return whether a library could be imported."""
    return importlib.util.find_spec(library) is not None


def expect(holds: bool, message: str) -> None:
    """Exit with ``message`` unless ``holds``."""
    if not holds:
        raise SystemExit(message)


if __name__ == "__main__":
    main()
