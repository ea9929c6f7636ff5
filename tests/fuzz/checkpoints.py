"""Load damaged and forged checkpoints into a job that is already trained.

If a load succeeds, an independent reader of the folder checks the result.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dist_adamw import Checkpoint, CheckpointError, CyclicLRWithRestarts, DistAdamW, RestartSchedule, load, save
from tests.fuzz.judge import REFUSED, RIGHT, Tally, Wrong, bounds, check_sentence
from tests.fuzz.mutations import INDEX, change_bytes, change_files, change_index, seal
from tests.ranks import run_ranks, run_ranks_within

KINDS = {"ours": ("ours", 1), "ours-2": ("ours", 2), "ours-3": ("ours", 3), "torch": ("torch", 1)}
CHOICES = (None, "strict", "checkpoint", "new")
State = dict[str, Any]


class Job:
    """A small model, its optimizer and its schedule, some updates on.

    Args:
        kind: "ours"; "ours into torch": torch's AdamW with our schedule; "torch": torch's AdamW and schedule.
        seed: Of weights and data.
        updates: How many.
    """

    def __init__(self, kind: str, seed: int, updates: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
        self.model[0].bias.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.0}]
        if kind == "ours":
            self.optimizer: Any = DistAdamW(groups, lr=1e-2, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        if kind == "torch":
            self.scheduler: Any = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        else:
            self.scheduler = CyclicLRWithRestarts(self.optimizer, 8, 40, 1.5, 1.5, min_lr=1e-5, warmup_samples=10)
        for _ in range(updates):
            self.model(torch.randn(8, 6)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def state(self) -> State:
        """All that a load may change, to the bit."""
        names = {p: n for n, p in self.model.named_parameters()}
        found: State = {f"model.{name}": bits(value) for name, value in self.model.state_dict().items()}
        for param, values in self.optimizer.state.items():
            for kind, value in values.items():
                found[f"{kind}.{names[param]}"] = bits(value) if value.ndim else float(value)
        for g, group in enumerate(self.optimizer.param_groups):
            found |= {f"group {g} {k}": repr(v) for k, v in group.items() if k not in ("params", "param_names")}
        found["schedule"] = repr(self.scheduler.state_dict())
        found |= {"python": random.getstate(), "torch": bits(torch.get_rng_state())}
        kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
        found["numpy"] = (kind, keys.tolist(), *rest)
        if isinstance(self.optimizer, DistAdamW):
            found["updates"] = self.optimizer.updates
        return found


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    tensor = tensor.detach().contiguous()
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0, dtype=torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), bytes(flat.tolist())


def differences(one: State, other: State) -> list[str]:
    return sorted(k for k in {*one, *other} if k not in one or k not in other or repr(one[k]) != repr(other[k]))


# ---------------------------------------------------------------------------------------------- another reading


class Reading:
    """A folder's content, read the simple way."""

    def __init__(self, folder: Path) -> None:
        self.index = json.loads((folder / INDEX).read_bytes())
        self.about = self.index["about"]
        self.files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != INDEX}

    def tensor(self, key: str) -> Tensor:
        facts = self.index["tensors"][key]
        dtype = getattr(torch, facts["dtype"])
        whole = torch.zeros(facts["shape"], dtype=dtype)
        for offsets, sizes, file, begin in facts["chunks"]:
            end = begin + int(np.prod(sizes, dtype=object)) * dtype.itemsize
            if begin == end:
                continue
            part = torch.frombuffer(bytearray(self.files[file][begin:end]), dtype=dtype).reshape(sizes)
            whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] = part
        return whole

    def check(self, job: Job, found: Checkpoint, before: State, choice: str | None) -> None:
        """Raise where ``job`` is not what this folder says."""
        expected = dict(before)
        for key in [key for key in expected if key.startswith(("exp_avg", "step."))]:
            del expected[key]
        for name, value in job.model.state_dict().items():
            expected[f"model.{name}"] = bits(self.tensor(f"model.{name}").to(value.dtype))
        for name, param in job.model.named_parameters():
            ours = isinstance(job.optimizer, DistAdamW)
            kinds = [k.partition(".")[0] for k in self.index["tensors"] if k.partition(".")[2] == name]
            for kind in {*kinds} - {"model", "master", "rng"}:
                if param.requires_grad and (not ours or kind in ("exp_avg", "exp_avg_sq")):
                    value = self.tensor(f"{kind}.{name}")
                    expected[f"{kind}.{name}"] = bits(value.to(param.dtype) if ours else value)
            if param.requires_grad and f"exp_avg.{name}" in expected:
                expected[f"step.{name}"] = float(np.float32(self.about["scalars"][name]["step"]))
        self._expect_schedule(expected, job, choice or "strict")
        texts = [bytes(self.tensor(key).tolist()) for key in ["rng.0"] if key in self.index["tensors"]]
        for text in texts:
            state = json.loads(text)
            version, numbers, gauss = state["python"]
            expected["python"] = (version, tuple(numbers), gauss)
            told = torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8)
            expected["torch"] = bits(torch.Generator().set_state(told).get_state())  # it has bytes without meaning
            if "numpy" in state:
                expected["numpy"] = tuple(state["numpy"])
        after = job.state()
        if "updates" in expected:
            expected["updates"] = max((int(v) for k, v in expected.items() if k.startswith("step.")), default=0)
        if wrong := differences(expected, after):
            shown = {k: (str(expected.get(k))[:90], str(after.get(k))[:90]) for k in wrong[:3]}
            raise Wrong(f"loaded in silence, and wrong: {wrong} (expected, found): {shown}")
        if found.extra != self.about["extra"] and repr(found.extra) != repr(self.about["extra"]):
            raise Wrong(f"extra is {found.extra!r}")
        for group in job.optimizer.param_groups:
            if not all(0.0 <= float(group[key]) < math.inf for key in ("lr", "weight_decay", "eps")):
                raise Wrong(f"a group is {group}")

    def _expect_schedule(self, expected: State, job: Job, choice: str) -> None:
        saved = self.about["schedule"]
        of = {name: group for group in self.about["groups"] for name in group["names"]}
        names = {p: n for n, p in job.model.named_parameters()}
        for g, group in enumerate(job.optimizer.param_groups):
            theirs: dict[str, Any] = next((of[names[p]] for p in group["params"] if names[p] in of), {})
            if choice == "checkpoint":
                for key in ("betas", "eps", "amsgrad", "maximize"):
                    if key in theirs:
                        expected[f"group {g} {key}"] = repr(tuple(theirs[key]) if key == "betas" else theirs[key])
            if not isinstance(job.scheduler, CyclicLRWithRestarts) and choice != "new":
                for key in ("lr", "weight_decay", "initial_lr"):
                    if key in theirs:
                        expected[f"group {g} {key}"] = repr(theirs[key])
        if not isinstance(job.scheduler, CyclicLRWithRestarts):
            expected["schedule"] = repr({k: saved[k] for k in job.scheduler.state_dict()})
            return
        ours = job.scheduler.configuration()
        told = dict(ours)
        if choice == "checkpoint":  # what is equal is no difference: False and 0.0, 10 and 10.0
            theirs = saved["configuration"]
            told |= {k: v for k, v in theirs.items() if v != ours[k] and (k, v) != ("epoch_size", None)}
        reference = saved["reference_batch_size"] or 8
        options = {k: told[k] for k in RestartSchedule.__dataclass_fields__ if k in told and k != "batch_size"}
        schedule = RestartSchedule(batch_size=reference, **options)
        point = schedule.at(saved["samples"])
        grown = {None: 1.0, "linear": 8 / reference, "sqrt": math.sqrt(8 / reference)}[told["lr_scaling"]]
        for g, (lr, min_lr, decay, *scales) in enumerate(told["groups (lr, min_lr, weight_decay)"]):
            scale = scales[0] if scales else 1.0
            expected[f"group {g} lr"] = repr(schedule.lr(point, lr, min_lr) * scale * grown)
            if told["normalize_weight_decay"] is not False:
                norm = schedule.weight_decay_norm(point, 8)
                expected[f"group {g} weight_decay"] = repr(decay * norm / (lr * scale * grown) if lr * scale else 0.0)
        now = {
            **job.scheduler.state_dict(),
            "samples": saved["samples"],
            "reference_batch_size": reference,
            "batch_size": 8,
        }
        now["configuration"] = told
        expected["schedule"] = repr(now)


# ---------------------------------------------------------------------------------------------- the inputs


def write(kind: str, folder: str, seed: int, updates: int) -> None:
    """On one rank or several."""
    job = Job(kind, seed, updates)
    save(folder, job.model, job.optimizer, job.scheduler, extra={"text": "as it was", "list": [1, None, 2.5]})


class Checkpoints:
    """Real checkpoints, and what becomes of them. Input ``i`` depends on the seed and on ``i`` alone.

    Args:
        root: An empty folder.
        seed: Of all inputs.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        for name, (kind, ranks) in KINDS.items():
            for which, updates in {"a": 3, "b": 5}.items():
                if ranks == 1:
                    write(kind, str(root / f"{name}-{which}"), 1, updates)
                else:
                    run_ranks(ranks, write, kind, str(root / f"{name}-{which}"), 1, updates)
        self.jobs: dict[str, tuple[Job, State]] = {}

    def input(self, i: int, kinds: Sequence[str] = tuple(KINDS)) -> tuple[str, str, Path, bool, str | None]:
        """Make input ``i``: what was done to which checkpoint, its folder, whether its sums fit, and the choice."""
        rng = random.Random(f"{self.seed} {i}")
        name = rng.choice(kinds)
        source, other = (self.root / f"{name}-{which}" for which in "ab")
        folder = self.root / "input"
        clear(folder)
        clear(self.root / "input-outside")
        shutil.copytree(source, folder)
        change = rng.choice([change_bytes, change_files, change_index, change_index, change_index])
        how = change(folder, rng, other)
        sealed = (
            rng.random() < (0.85 if change is change_index else 0.3) and change is not change_files and seal(folder)
        )
        return f"{name}: {how}{', sums made to fit' if sealed else ''}", name, folder, sealed, rng.choice(CHOICES)

    def job(self, kind: str) -> tuple[Job, State]:
        """A trained job, and its state; always in that state."""
        if kind not in self.jobs:
            job = Job(kind, 7, 4)
            self.jobs[kind] = job, job.state()
        job, state = self.jobs[kind]
        random.setstate(state["python"])
        torch.set_rng_state(torch.tensor(list(state["torch"][2]), dtype=torch.uint8))
        np.random.set_state(state["numpy"])
        return job, state

    def one(self, name: str, folder: Path, sealed: bool, choice: Any, into: str) -> str:
        """Load an input, and raise unless it ends well."""
        job, before = self.job(into)
        try:
            found = load(folder, job.model, job.optimizer, job.scheduler, on_difference=choice)
        except CheckpointError as error:
            if changed := differences(before, job.state()):
                del self.jobs[into]
                raise Wrong(f"refused, and changed {changed}: {error}") from error
            return check_sentence(error, str(folder))
        except BaseException:
            del self.jobs[into]
            raise
        del self.jobs[into]
        Reading(folder if sealed else self.root / f"{name}-a").check(job, found, before, choice)
        return RIGHT

    def judge(self, numbers: Iterator[int]) -> Tally:
        tally = Tally("checkpoints")
        for i in numbers:
            how, name, folder, sealed, choice = self.input(i)
            into = "torch" if name == "torch" else "ours into torch" if i % 5 == 0 else "ours"
            self.job(into)
            again = f"--only checkpoints --seed {self.seed} --first {i} --inputs 1"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tally.judge(
                    lambda: f"{again}: {how}, {choice}, {into}",  # noqa: B023 - called at once
                    lambda: self.one(name, folder, sealed, choice, into),  # noqa: B023
                )
        return tally

    def judge_on_ranks(self, numbers: Iterator[int], world_size: int = 2) -> Tally:
        """Load the same on several ranks: all must end in the same way."""
        tally = Tally(f"checkpoints on {world_size} ranks")
        for i in numbers:
            how, _, folder, _, choice = self.input(i, [kind for kind in KINDS if kind != "torch"])
            again = f"--only ranks --seed {self.seed} --first {i} --inputs 1"
            tally.judge(
                lambda: f"{again}: {how}, {choice}",  # noqa: B023
                lambda: self._on_ranks(folder, choice, world_size),  # noqa: B023
            )
        return tally

    def _on_ranks(self, folder: Path, choice: Any, world_size: int) -> str:
        ends = run_ranks_within(20, world_size, load_on_a_rank, str(folder), choice)
        if any(end != ends[0] for end in ends):
            raise Wrong(f"ranks end differently: {ends}")
        return REFUSED if ends[0] else RIGHT


def load_on_a_rank(folder: str, choice: Any) -> str:
    """The sentence with which it ends; none when it has loaded."""
    job = Job("ours", 7, 2)
    before = job.state()
    try:
        with bounds():
            load(folder, job.model, job.optimizer, job.scheduler, on_difference=choice)
    except CheckpointError as error:
        if changed := differences(before, job.state()):
            raise Wrong(f"refused, and changed {changed}: {error}") from error
        check_sentence(error, folder)
        return str(error)
    return ""


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
