"""The examples as they were before dist_adamw: torch's AdamW and scheduler, without checkpoints.

    python -m tests.integration.plain_examples                       # how many lines of each example differ
    python -m tests.integration.plain_examples torch_ddp > plain.py  # one of them, to run
    diff plain.py examples/torch_ddp.py
    python -m tests.integration.plain_examples --run                 # train each on one process, without dist_adamw

`CHANGES` has the way back. "-" drops the next line that begins so, "+" writes a line in its place with the same indent,
and "=" keeps a line, for a "+" that follows it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
_TRAINER = """
- from dist_adamw
- trainer = prepare_trainer
"""
_TORCH_LOOP = """\
- scheduler =
+ scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, len(loader), T_mult=2)
- folder =
- if args.resume
- load(
- first_epoch, done
- for epoch in
+ for epoch in range(args.epochs):
- if epoch == first_epoch
- continue
- samples, lr =
+ samples, lr = (epoch * len(loader) + number) * BATCH, scheduler.get_last_lr()[0]
= loss.backward()
+ nn.utils.clip_grad_norm_(model.parameters(), 1.0)
- if folder.is_due
- folder.save
"""
CHANGES = {
    "accelerate_causal_lm": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
- scheduler =
+ scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, len(loader), T_mult=2)
- prepared =
+ prepared = accelerator.prepare(model, optimizer, loader, eval_loader, scheduler)
- folder =
- if args.resume
- accelerator.load_state
- for epoch in
+ for epoch in range(args.epochs):
- for batch in
+ for number, batch in enumerate(loader):
- samples, lr =
+ samples, lr = (epoch * len(loader) + number) * BATCH, scheduler.get_last_lr()[0]
- if folder.is_due
- folder.save
""",
    "accelerate_gan": """
- from dist_adamw
- optimizer_g =
+ optimizer_g = torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
- optimizer_d =
+ optimizer_d = torch.optim.AdamW(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
- scheduler_g =
+ scheduler_g = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer_g, 2 * len(loader), T_mult=2)
- scheduler_d =
+ scheduler_d = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer_d, 2 * len(loader), T_mult=2)
- prepared =
+ prepared = accelerator.prepare(*objects)
- folder =
- if args.resume
- accelerator.load_state
- for epoch in
+ for epoch in range(args.epochs):
- for real, noise in
+ for number, (real, noise) in enumerate(loader):
- samples, lr =
+ samples, lr = (epoch * len(loader) + number) * BATCH, scheduler_g.get_last_lr()[0]
- if folder.is_due
- folder.save
""",
    "accelerate_vision": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
- scheduler =
+ scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, args.samples // BATCH, T_mult=2)
- prepared =
+ prepared = accelerator.prepare(model, optimizer, loader, eval_loader, scheduler)
- folder =
- if args.resume
- accelerator.load_state
- for epoch in
+ updates = 0
+ for epoch in range(args.epochs):
- samples, lr =
+ samples, lr = updates * BATCH, scheduler.get_last_lr()[0]
= losses.clear()
+ updates += 1
- if scheduler.samples
+ if updates * BATCH == args.stop_at:
- folder.save
""",
    "deepspeed_initialize": """
- import dist_adamw
- from dist_adamw
- "zero_allow_untested_optimizer"
- dist_adamw.register_deepspeed
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
- scheduler =
+ scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, len(loader), T_mult=2)
- dist_adamw.prepare_deepspeed
- folder =
- if args.resume
- engine.load_checkpoint
- first_epoch, done
- for epoch in
+ for epoch in range(args.epochs):
- if epoch == first_epoch
- continue
- samples, lr =
+ samples, lr = (epoch * len(loader) + number) * BATCH, scheduler.get_last_lr()[0]
- if folder.is_due
- folder.save
""",
    "lightning_module": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)
- scheduler = CyclicLRWithRestarts
+ scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, self.samples // BATCH, T_mult=2)
- self.row =
+ self.row = f"samples {self.trainer.global_step * BATCH} lr {scheduler.get_last_lr()[0]!r}"
- scheduler: Any
- if scheduler.samples
+ if self.trainer.global_step * BATCH == self.stop_at:
- trainer = prepare_lightning
""",
    "ray_train": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
- optimizer.attach
- scheduler =
+ scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, len(loader), T_mult=2)
- folder =
- if (newest
- load(
- first_epoch, done
- for epoch in
+ for epoch in range(config["epochs"]):
- if epoch == first_epoch
- continue
- samples, lr =
+ samples, lr = (epoch * len(loader) + number) * BATCH, scheduler.get_last_lr()[0]
= loss.backward()
+ nn.utils.clip_grad_norm_(model.parameters(), 1.0)
- if folder.is_due
- folder.save
""",
    "timm_loop": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(groups, lr=1e-3)
- optimizer.attach
- scheduler =
+ scheduler = timm.scheduler.CosineLRScheduler(optimizer, len(loader), cycle_mul=2, cycle_limit=9, t_in_epochs=False)
- folder =
- if args.resume
- load(
- for epoch in
+ for epoch in range(args.epochs):
- for image, label
+ for number, (image, label) in enumerate(loader):
- samples, lr =
+ samples, lr = (epoch * len(loader) + number) * BATCH, optimizer.param_groups[-1]["lr"]
= loss.backward()
+ nn.utils.clip_grad_norm_(model.parameters(), 1.0)
- scheduler.step()
+ scheduler.step_update(epoch * len(loader) + number + 1)
- folder.save
""",
    "torch_ddp": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
- optimizer.attach
"""
    + _TORCH_LOOP,
    "torch_fsdp2": """
- from dist_adamw
- optimizer = DistAdamW
+ optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
"""
    + _TORCH_LOOP,
    "trainer": _TRAINER,
    "trainer_peft": _TRAINER,
    "trainer_trl": _TRAINER,
}


def example(name: str) -> list[str]:
    """Return the lines of an example."""
    return (ROOT / "examples" / f"{name}.py").read_text().splitlines()


def plain(name: str) -> list[str]:
    """Return the lines of an example without dist_adamw."""
    lines, place, indent = example(name), 0, ""
    for change in CHANGES[name].strip().splitlines():
        kind, text = change[0], change[2:]
        if kind == "+":
            lines.insert(place, indent + text)
            place += 1
            continue
        place = next((i for i in range(place, len(lines)) if lines[i].lstrip().startswith(text)), -1)
        if place < 0:
            raise ValueError(f"examples/{name}.py has no line after the one before that begins with {text!r}")
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        if kind == "-":
            del lines[place]
        else:
            place += 1
    return lines


def differing(name: str) -> list[int]:
    """Return the numbers, from 1, of the lines of an example that the plain script does not have."""
    matcher = difflib.SequenceMatcher(None, plain(name), example(name), autojunk=False)
    return [i + 1 for tag, _, _, begin, end in matcher.get_opcodes() if tag != "equal" for i in range(begin, end)]


def marked(name: str) -> list[int]:
    """Return the numbers of the lines that say that they differ."""
    return [i for i, line in enumerate(example(name), 1) if line.endswith("# dist_adamw")]


def run(name: str, options: list[str]) -> int:
    """Train a plain script for two epochs in a process that cannot import dist_adamw; return its status."""
    program = (
        "import runpy, sys; sys.modules['dist_adamw'] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text("\n".join(plain(name)) + "\n")
        command = [sys.executable, "-c", program, str(path), "--out", folder, "--epochs", "2", *options]
        return subprocess.run(command, env={**os.environ, **rank, "ACCELERATE_USE_CPU": "true"}).returncode


def main() -> int:
    """Print the counts, or a script; the status is 1 if a mark is missing or too many, or a script fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.integration.plain_examples")
    parser.add_argument("name", nargs="?", choices=EXAMPLES, help="print this one")
    parser.add_argument("--run", action="store_true", help="train all of them, or this one")
    options = parser.parse_args()
    if options.name and not options.run:
        print("\n".join(plain(options.name)))
        return 0
    is_good = True
    for name in [options.name] if options.name else EXAMPLES:
        lines, marks = differing(name), marked(name)
        print(f"{name}: {len(lines)} of {len(example(name))} lines differ", flush=True)
        if wrong := sorted({*lines} ^ {*marks}):
            print(f"  lines {wrong} differ without a mark, or have a mark and do not differ")
        is_good &= not wrong and not (options.run and run(name, ["--samples", "128"]))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
