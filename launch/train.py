"""The main job: train a byte-level GPT with DistAdamW and warm restarts, on any number of ranks.

    python launch/train.py                                    # one process
    launch/accelerate.sh --config configs/train/small.yaml    # as many as the launcher starts
    launch/accelerate.sh --data my.txt --recipe.lr 1e-3 --out runs/mine
    launch/accelerate.sh --data my.txt --recipe.lr 1e-3 --out runs/mine --resume
    launch/elastic.sh --out runs/mine --run.save_every 1600   # continues when ranks or machines fail

The loop is a plain Accelerate loop: `Job._micro_batch`. ``options.py`` has the options, ``gpt.py`` the model,
``text.py`` the text, ``recipe.py`` the optimizer and its schedule, ``run.py`` checkpoints and signals, ``report.py``
tables and curves.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from gpt import GPT, byte_losses, next_byte_losses
from mistakes import STATUS, report
from options import AUTO, Config, parse
from report import History, Row, draw, loss_table, megabytes, memory_table
from run import Checkpoints, JobError, Progress, Snapshots, StopSignals, everywhere, on_main
from text import load_text
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import dist_adamw


def check_launch(accelerator: Accelerator) -> None:
    """Raise if the launcher was asked for several ranks and Accelerate sees only one. Local."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    # accelerate launch sets MASTER_ADDR only if it was asked for several processes.
    lost = "ACCELERATE_DYNAMO_MODE" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if accelerator.num_processes == 1 and (wanted > 1 or lost):
        raise ValueError(
            f"the launcher was asked for {wanted if wanted > 1 else 'several'} ranks, but Accelerate sees one. On CPU, "
            "set ACCELERATE_USE_CPU=true and use configs/accelerate/cpu_2.yaml, not --cpu or MULTI_CPU; "
            "launch/accelerate.sh and launch/torchrun.sh do."
        )


class Job:
    """One training run, from its configuration to its last table. Every method is collective.

    Raises:
        ValueError: the configuration does not work; on every rank.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stopped_by: signal.Signals | None = None
        self.out = Path(config.out).expanduser()
        tracking = config.run.tracker in map(str, get_available_trackers())
        # DDP otherwise keeps a second copy of the gradients.
        handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        group: dict[str, Any] = {}
        if config.run.timeout is not None:
            group["timeout"] = timedelta(seconds=config.run.timeout)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            dist_adamw.register_deepspeed()
            if not torch.cuda.is_available():  # otherwise Accelerate counts one process on each rank
                group["backend"] = "gloo"
        if group:
            handlers.append(InitProcessGroupKwargs(**group))
        self.accelerator = Accelerator(
            log_with=config.run.tracker if tracking else None,
            project_dir=str(self.out),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.run.seed),
            kwargs_handlers=handlers,
        )
        check_launch(self.accelerator)
        # Only after the rendezvous: a rank that waits there for a dead one must end on SIGTERM, not 30 s later.
        self.stop = StopSignals()
        self.checkpoints = Checkpoints(self.accelerator, self.out, config.run.keep)
        self.snapshots = Snapshots(self.out) if config.run.snapshots else None
        try:
            on_main(self.accelerator, self._claim_folder)
            self._build()
            if not tracking and config.run.tracker != "none":
                self.say(f"{config.run.tracker} is not installed: nothing is tracked but history.csv.")
            self.progress = Progress()
            if not self._resume():
                # Only after every check: an invalid configuration must not cost any checkpoints.
                on_main(self.accelerator, self.checkpoints.folder.discard)
                if self.snapshots is not None:
                    on_main(self.accelerator, self.snapshots.folder.discard)
            self.progress.config = config.shaping()
            self.progress.text = self.text.digest
            self.history = everywhere(self._open_history)
            self._start_tracking()
            self.tracking = dist_adamw.Tracking(self.optimizer, self.scheduler, self.accelerator)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        self.checkpoints.folder.close()
        if self.snapshots is not None:
            self.snapshots.folder.close()

    def _claim_folder(self) -> None:
        found = self.checkpoints.folder.all()
        if found and self.config.resume is None and not self.config.run.overwrite:
            raise ValueError(
                f"{self.checkpoints.folder.root} has checkpoints, the newest {found[-1].name}. Continue with --resume, "
                "choose another --out, or discard them with --run.overwrite true."
            )
        self.out.mkdir(parents=True, exist_ok=True)

    def _build(self) -> None:
        """Create the text, model, optimizer, loaders and schedule, and prepare them."""
        config, accelerator = self.config, self.accelerator
        one_pass = {"micro_batch_size": config.recipe.micro_batch, "data_parallel_size": accelerator.num_processes}
        # All are checked; `prepare` follows a schedule from the first one on.
        self.batch, *_ = (dist_adamw.GlobalBatch.solve(size=size, **one_pass) for size in config.recipe.batch_sizes)
        accelerator.gradient_accumulation_steps = self.batch.gradient_accumulation_steps
        # An epoch is then a whole number of updates of each size.
        sizes = {"context": config.model.context, "global_batch": math.lcm(*config.recipe.batch_sizes)}
        self.text = everywhere(lambda: load_text(config.data, config.text, **sizes))
        if len(set(gather_object([self.text.digest]))) > 1:
            raise ValueError(f"the ranks read different texts from {self.text.source}. Pass one they share (--data).")
        set_seed(config.run.seed)
        model = GPT(config.model)
        self.parameters = sum(p.numel() for p in model.parameters())
        optimizer = self._inner = config.recipe.make_optimizer(model)
        scheduler = config.recipe.make_scheduler(optimizer)
        order = torch.Generator().manual_seed(config.run.seed)
        micro_batch = self.batch.micro_batch_size
        loader = DataLoader(self.text.training, micro_batch, shuffle=True, generator=order, drop_last=True)
        self.model, self.optimizer, self.loader, self.scheduler = dist_adamw.prepare(
            accelerator, model, optimizer, loader, scheduler
        )
        self.held_out = accelerator.prepare(DataLoader(self.text.held_out, micro_batch, generator=torch.Generator()))
        total = config.recipe.total_samples
        length = {"cycles": config.recipe.cycles} if total is None else {"total_samples": total}
        self.preview = self.scheduler.preview(**length)
        assert self.preview.batches is not None
        self.batches = self.preview.batches
        self.restarts = [row.first_sample for row in self.preview.rows[1:]]
        self.end = self.preview.rows[-1].first_sample + self.preview.rows[-1].samples
        if total is not None and self.preview.end is not None:
            self.end = self.preview.end.total_samples
        # In fp64, in which sums of a few fp32 losses are exact: the mean does not depend on the number of ranks.
        self.wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=self.wide, device=accelerator.device)
        self.micro_batches = 0  # of the update so far, on this rank

    def _find_checkpoint(self) -> tuple[Path, Progress] | None:
        """Return the checkpoint to resume from; None to start from the beginning. Collective."""
        if self.config.resume is None:
            return None
        if self.config.resume != AUTO:
            return self.checkpoints.find(self.config.resume)
        paths = on_main(self.accelerator, self.checkpoints.folder.all)
        if not paths:
            return None
        for newer in reversed(paths[1:]):  # unattended, so fall back to older ones; the oldest raises below
            try:
                return self.checkpoints.find(str(newer))
            except JobError as error:
                self.say(f"not resumed from: {error}")
        return self.checkpoints.find(str(paths[0]))

    def _resume(self) -> bool:
        """Restore everything from a checkpoint; return False if there is none to resume from."""
        found = self._find_checkpoint()
        if found is None:
            return False
        path, progress = found
        ours = self.config.shaping()
        differing = [k for k in ours if progress.config.get(k) != ours[k]]
        if differing:
            lines = "; ".join(f"{k} was {progress.config.get(k)!r} and is {ours[k]!r}" for k in differing)
            raise ValueError(f"{path} has other options: {lines}. Pass the same options, or choose another --out.")
        if progress.text != self.text.digest:
            raise ValueError(f"{path} was trained on another text than {self.text.source}. Pass the same --data.")
        everywhere(lambda: self.accelerator.load_state(str(path)))
        self.progress = progress
        self.say(f"resuming from {path}")
        folders = [kept.folder for kept in (self.checkpoints, self.snapshots) if kept is not None]
        aside = on_main(self.accelerator, lambda: [path for f in folders for path in f.set_aside(progress.samples)])
        for later in aside:
            self.say(f"set aside, since training continues from an earlier one: {later}")
        return True

    def _open_history(self) -> History | None:
        if not self.accelerator.is_main_process:
            return None
        return History(self.out / "history.csv", self.progress.samples)

    def _start_tracking(self) -> None:
        resumed = self.progress.samples > 0
        options = {
            k: str(v) if isinstance(v, list | dict) else v for k, v in self.config.shaping().items() if v is not None
        }
        self.accelerator.init_trackers("dist_adamw", None if resumed else options)

    @property
    def done(self) -> bool:
        """Whether the last cycle is complete, or a signal asks to stop."""
        return self.stopped_by is not None or self.progress.samples >= self.end

    def say(self, text: str) -> None:
        """Print on the main rank, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def announce(self) -> None:
        """Print a summary of the job."""
        batch, sizes, text = self.batch, self.config.model, self.text
        passes = f"{batch.micro_batch_size} x {batch.gradient_accumulation_steps} accumulated"
        per_epoch = len(text.training) // batch.size
        device = f"{self.accelerator.device.type}, mixed precision: {self.accelerator.mixed_precision}"
        self.say(
            f"text          {text.source}: {text.size:,} bytes\n"
            f"samples       {len(text.training):,} windows of {sizes.context} bytes; {len(text.held_out)} held out\n"
            f"model         {self.parameters:,} parameters: {sizes.layers} layers of width {sizes.width}; {device}\n"
            f"global batch  {batch.size} samples = {passes} x {batch.data_parallel_size} ranks\n"
            f"epoch         {per_epoch:,} updates; {len(self.preview.rows)} cycles end at sample {self.end:,}\n\n"
            f"{self.preview}\n\n{memory_table(self.parameters, batch.data_parallel_size)}\n"
        )

    # ---------------------------------------------------------------- training

    def train(self) -> None:
        """Train to the end of the last cycle, or until a stop signal."""
        self.began = time.perf_counter() - (self.history.seconds if self.history else 0.0)
        context = self.config.model.context
        _, end = self.batches.updates(0, self.end)
        with tqdm(
            total=end * context,
            initial=self.progress.samples * context,
            unit=" tokens",
            unit_scale=True,
            dynamic_ncols=True,
            # In a log file every refresh is a separate line.
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            disable=not self.accelerator.is_main_process,
        ) as self.bar:
            self.model.train()
            while not self.done:
                for windows in dist_adamw.rest_of_epoch(self.loader):
                    self._micro_batch(windows)
                    if self.done:
                        break

    def _micro_batch(self, windows: Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            loss = next_byte_losses(self.model, windows).mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach()
        self.micro_batches += 1
        if self.accelerator.sync_gradients:
            self._after_update()

    def _after_update(self) -> None:
        loss = self._agree()
        progress, before = self.progress, self.progress.samples
        if self.scheduler.samples == before:
            self.say(f"update skipped after sample {before:,}: its gradients are not finite")
        else:
            progress.samples, progress.updates = self.scheduler.samples, progress.updates + 1
        restarted = self.scheduler.schedule.at(before).cycle != self.scheduler.schedule.at(progress.samples).cycle
        run = self.config.run

        def due(every: int) -> bool:
            return restarted or (every > 0 and before // every != progress.samples // every)

        val_loss = self.validate() if due(run.validate_every) else None
        if progress.samples > before:
            self._record(loss, val_loss)
        if restarted and self.snapshots is not None:
            self.snapshots.save(progress.samples, self.model)
        if due(run.save_every) or self.stopped_by is not None:
            path = self.checkpoints.save(progress)
            self.say(f"saved {path}")

    def _agree(self) -> float:
        """Average the loss over the global batch and sum the ranks' signals, in one collective per update."""
        mine = torch.tensor([0.0, *self.stop.flags()], dtype=self.wide, device=self.accelerator.device)
        mine[0] = self.loss_sum
        self.loss_sum.zero_()
        total: float
        total, *flags = self.accelerator.reduce(mine, reduction="sum").tolist()
        self.stopped_by = self.stop.agreed(flags)
        loss = total / (self.micro_batches * self.batch.data_parallel_size)
        self.micro_batches = 0
        if not math.isfinite(loss):
            raise JobError(
                f"the loss became {loss} after sample {self.progress.samples:,}. Lower recipe.lr, or set "
                "recipe.max_grad_norm, and start again with another --out."
            )
        return loss

    def _record(self, loss: float, val_loss: float | None) -> None:
        progress = self.progress
        if progress.updates == 1:
            self.say(f"optimizer state measured on the main rank: {megabytes(self._inner.state_bytes)}")
        if self.history is None:
            return
        values = self.tracking.values()
        lr, decay = values["lr"], values["weight_decay"]
        self.history.append(Row(progress.samples, loss, lr, decay, val_loss, time.perf_counter() - self.began))
        self.tracking.log({"loss": loss} if val_loss is None else {"loss": loss, "val_loss": val_loss})
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2e}, weight decay {decay:.2e}", refresh=False)
        self.bar.update(progress.samples * self.config.model.context - self.bar.n)

    def validate(self) -> float:
        """Return the mean loss on the held-out windows, in nats per byte."""
        return float(self._held_out_losses(next_byte_losses).double().mean())

    @torch.no_grad()
    def _held_out_losses(self, losses_of: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        self.model.eval()
        losses = [self.accelerator.gather_for_metrics(losses_of(self.model, w)) for w in self.held_out]
        self.model.train()
        return torch.cat(losses)

    def _losses_of_averages(self) -> dict[str, float]:
        """Return the held-out losses of the averages, and of the ensemble of the cycle ends: the mean probability."""
        found = {}
        for name in self._inner.averages:
            if self._inner.contributions(name):
                with self._inner.averaged(name):
                    found[f"held-out loss, average {name}"] = self.validate()
        if self.snapshots is not None and self.snapshots.folder.all():
            losses = [self._held_out_losses(byte_losses).double() for _ in self.snapshots.each(self.model)]
            ensemble = torch.stack(losses).neg().logsumexp(0) - math.log(len(losses))
            found[f"held-out loss, ensemble of {len(losses)} cycle ends"] = float(-ensemble.mean())
        return found

    # ---------------------------------------------------------------- the end

    def finish(self) -> None:
        """Draw the curves, print the table, and close trackers and checkpoints."""
        is_done = self.stopped_by is None
        digest = digest_of(self.model) if self.config.recipe.reproducible and is_done else None
        averages = self._losses_of_averages() if is_done else {}
        if self.history is not None:
            self._tell(self.history, averages, digest)
        self.accelerator.end_training()
        self._close()

    def _cycle_ends(self, history: History) -> dict[int, Row]:
        """Return the update that ended each cycle, as far as the history has it."""
        rows, ends = history.rows, [*self.restarts, self.end]
        begins = [rows[0].samples - self.batch.size, *(row.samples for row in rows)]
        return {
            i: row
            for before, row in zip(begins, rows, strict=False)
            for i, end in enumerate(ends)
            if before < end <= row.samples
        }

    def _tell(self, history: History, averages: dict[str, float], digest: str | None) -> None:
        if not history.rows:
            return
        known = {"unigram entropy": self.text.entropies.unigram, "bigram entropy": self.text.entropies.bigram}
        title = f"{self.parameters:,} parameters, global batch {self.batches}, {self.batch.data_parallel_size} ranks"
        try:
            draw(self.out / "curves.png", history.rows, self.preview, known, title)
            self.say(f"curves: {self.out / 'curves.png'}")
        except ModuleNotFoundError as error:
            self.say(f"no curves: {error}")
        if self.stopped_by is not None:
            return
        last = history.rows[-min(len(history.rows), 20) :]
        held_out = {"held-out loss": [row.val_loss for row in history.rows if row.val_loss is not None][-1]}
        if averages:
            ends = self._cycle_ends(history)
            held_out = {f"held-out loss, cycle {i} ends": row.val_loss or 0.0 for i, row in ends.items()} | averages
        training = {f"training loss, last {len(last)} updates": sum(row.loss for row in last) / len(last)}
        self.say(f"\n{loss_table(known | training | held_out)}")
        if digest is not None:
            self.say(f"\nsha256 of the weights after {len(history.rows)} updates: {digest}")


def digest_of(model: nn.Module) -> str:
    """Return a hash of the bits of all parameters, in their order. Collective under FSDP2."""
    found = hashlib.sha256()
    for param in model.parameters():
        whole = param.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        # A copy: FSDP2 could no longer resize memory that numpy has seen.
        copy = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
        found.update(copy.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run(config: Config) -> int:
    """Train; return the exit code.

    Raises:
        JobError: an error that every rank raises.
    """
    try:
        job = Job(config)
    except (ValueError, dist_adamw.AgreementError) as error:  # up to here, every rank raises the same errors
        raise JobError(str(error)) from error
    job.announce()
    job.train()
    if job.stopped_by is not None:
        job.say(f"stopped by {job.stopped_by.name}; to continue, run the same command with --resume")
    job.finish()
    return 0 if job.stopped_by is None else 128 + job.stopped_by


def main() -> int:
    """Run the command line; a user's mistake is printed as one sentence."""
    try:
        try:
            config = parse()
        except ValueError as error:
            raise JobError(str(error)) from error
        return run(config)
    except JobError as error:
        report(f"train.py: {error}")
    except (dist_adamw.AgreementError, dist_adamw.CheckpointError) as error:
        report(f"train.py: {error}", may_restart=True)  # from the last checkpoint: a disk or a rank may have failed
    return STATUS


if __name__ == "__main__":
    sys.exit(main())
