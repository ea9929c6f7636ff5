"""The run log and ``dist-adamw diff`` in one process."""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_adamw import DistAdamW, RunLog, load, save
from dist_adamw.cli import main
from dist_adamw.run_log.digests import as_digest, batch_digest, position_sum, read_numbers
from dist_adamw.run_log.log_file import FILE_NAME, leaf, read_log
from tests.conftest import ROOT
from tests.known import to_memory_format

MASK = 2**64 - 1


def splitmix(value: int) -> int:
    value = value * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def sum_by_definition(words: list[int], first: int = 0) -> int:
    """The sum of words times the keys of their positions, written out."""
    total = 0
    for position, word in enumerate(words, first):
        row, column = divmod(position, 512)
        total += word * splitmix(column + 1) * (splitmix(-(row + 1)) | 1)
    return total & MASK


# ---------------------------------------------------------------- digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize("numel", [0, 1, 511, 512, 513, 512 * 130 + 7])
def test_a_sum_is_as_defined(dtype: torch.dtype, numel: int) -> None:
    tensor = (torch.randn(numel) * 9).to(dtype)
    size = tensor.element_size()
    kind = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int32}[size]
    words = np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), kind).tolist()
    assert int(position_sum(tensor)) & MASK == sum_by_definition(words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_sums_of_parts_add_up(dtype: torch.dtype) -> None:
    whole = torch.randn(512 * 300 + 31).to(dtype)
    expected = int(position_sum(whole)) & MASK
    for cuts in ([1], [511, 513], [512 * 130, 512 * 131 + 1], [7, 7, 100_000]):
        bounds = [0, *cuts, len(whole)]
        parts = [int(position_sum(whole[a:b], a)) for a, b in itertools.pairwise(bounds)]
        assert sum(parts) & MASK == expected


def test_every_bit_and_every_place_counts() -> None:
    torch.manual_seed(0)
    base = torch.randn(3, 700)
    found = {as_digest(int(position_sum(base)))}
    for place in (0, 1, 511, 512, 2099):
        for bit in range(32):
            changed = base.clone()
            changed.view(-1).view(torch.int32)[place] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit).int()
            found.add(as_digest(int(position_sum(changed))))
    swapped = base.clone()
    swapped[0, 0], swapped[2, 5] = base[2, 5], base[0, 0]
    signs = base.clone()
    signs[0] *= -1  # 700 sign bits
    found |= {as_digest(int(position_sum(changed))) for changed in (swapped, signs, -base)}
    assert len(found) == 1 + 5 * 32 + 3
    assert len({leaf(digest) for digest in found}) > 160  # the 16 bits that are kept depend on all others


def test_the_order_in_memory_does_not_count() -> None:
    images = torch.randn(4, 3, 20, 30)
    expected = int(position_sum(images))
    assert int(position_sum(images.contiguous(memory_format=torch.channels_last))) == expected
    assert int(position_sum(images.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0))) == expected
    assert int(position_sum(torch.cat([images, images], 1)[:, :3])) == expected


def test_digests_are_those_of_earlier_versions() -> None:
    digest = as_digest(int(position_sum(torch.arange(2000, dtype=torch.float32))))
    batch = batch_digest({"x": torch.arange(600), "y": [1, "two", None, 3.0]})()
    assert (f"{digest:016x}", f"{batch:016x}") == GOLDEN


def test_numbers_are_read_in_order() -> None:
    assert read_numbers([torch.tensor(3), torch.tensor(-1)]) == [3, -1]


class Opaque:
    """An object whose repr has an address."""


BATCH: dict[str, Any] = {
    "x": torch.arange(12.0).view(3, 4),
    "more": (torch.tensor([True]), [np.arange(3), "text", b"bytes", 1, 2.5, None]),
    "meta": Opaque(),
}


def changed(**values: Any) -> dict[str, Any]:
    return {**BATCH, **values}


@pytest.mark.parametrize(
    "other",
    [
        changed(x=torch.arange(12.0).view(4, 3)),
        changed(x=torch.arange(12.0).view(3, 4).double()),
        changed(x=torch.arange(12.0).view(3, 4) + torch.eye(3, 4)),
        changed(more=(torch.tensor([False]), BATCH["more"][1])),
        changed(more=(torch.tensor([True]), [np.arange(3), "texT", b"bytes", 1, 2.5, None])),
        changed(more=(torch.tensor([True]), [np.arange(3), "text", b"bytes", 1, 2.25, None])),
        changed(more=(torch.tensor([True]), [np.arange(1, 4), "text", b"bytes", 1, 2.5, None])),
        {"z": BATCH["x"], **{key: BATCH[key] for key in ("more", "meta")}},
    ],
)
def test_a_batch_that_differs(other: dict[str, Any]) -> None:
    assert batch_digest(other)() != batch_digest(BATCH)()


def test_a_batch_that_is_the_same() -> None:
    same = OrderedDict(reversed(changed(meta=Opaque()).items()))
    same["x"] = BATCH["x"].t().contiguous().t()
    assert batch_digest(same)() == batch_digest(BATCH)()
    assert batch_digest(np.array(["a", "b"]))() == batch_digest(np.array(["a", "b"]))()
    sparse = torch.eye(3).to_sparse()
    assert batch_digest(sparse)() == batch_digest(sparse)()  # by its shape


def test_a_batch_is_hashed_when_it_is_noted() -> None:
    x = torch.ones(3)
    digest, expected = batch_digest(x), batch_digest(torch.ones(3))()
    x.zero_()
    assert digest() == expected


# ---------------------------------------------------------------- logs


class Net(nn.Module):
    """Two numbered layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 4, 2)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.embed(x).flatten(1)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        output: Tensor = self.head(hidden)
        return output


def batch_of(update: int, number: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(10 * update + number))}


class Run:
    """A run of 2 micro-batches per update, logged to ``path``."""

    def __init__(self, path: Path, *, every: int = 1, **options: Any) -> None:
        self.model = Net()
        self.optimizer = DistAdamW(self.model.parameters(), 1e-2, **options)
        self.log = RunLog(path, self.model, self.optimizer, every=every)

    def train(self, first: int, last: int, swap: int | None = None) -> Run:
        for update in range(first, last + 1):
            for number in range(2):
                batch = batch_of(update + 100 * (update == swap and number == 1), number)
                self.log.batch(batch)
                self.model(batch["x"]).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def flip(param: Tensor, bit: int = 0) -> None:
    """Change one bit of a parameter's first element."""
    param.data.view(-1)[:1].view(torch.int32)[:] ^= 1 << bit


def diff(a: Path, b: Path, capsys: pytest.CaptureFixture[str], status: int) -> str:
    capsys.readouterr()
    assert main(["diff", str(a), str(b)]) == status
    out, error = capsys.readouterr()
    assert status == 2 or not error
    if status == 2:
        assert not out
        assert error.count("\n") == 1
    return out + error


@pytest.fixture
def a(tmp_path: Path) -> Path:
    Run(tmp_path / "a").train(1, 5)
    return tmp_path / "a"


def test_equal_runs(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "b").train(1, 5)
    assert diff(a, tmp_path / "b", capsys, 0) == "compared: 6 updates, 0 to 5\nequal\n"
    Run(tmp_path / "c").train(1, 3)
    assert diff(a / FILE_NAME, tmp_path / "c", capsys, 0) == "compared: 4 updates, 0 to 3\nequal\n"
    assert len((a / FILE_NAME).read_text().splitlines()) == 7  # one header


def test_a_batch_is_the_cause(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "b").train(1, 5, swap=2)
    text = diff(a, tmp_path / "b", capsys, 1)
    assert "batches differ first at update 2: micro-batch 1 of 0 to 1\n" in text
    assert "parameters differ first at update 2: embed.weight\n" in text
    assert "and 7 more of 8 parameters: embed.* (2 of 2), layers.0.* (2 of 2), layers.1.* (2 of 2), head.* (2" in text
    assert "the cause: the batch\n" in text
    main(["diff", "--json", str(a), str(tmp_path / "b")])
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert found["compared"] == {"updates": 6, "first": 0, "last": 5}
    assert found["batches"] == {"update": 2, "counts": [2, 2], "micro_batches": [1]}
    assert found["parameters"]["update"] == 2
    assert found["parameters"]["equal_at"] == 1
    assert len(found["parameters"]["names"]) == 8


def test_one_bit_of_a_parameter(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 2)
    run.log.close()
    run.train(3, 3)  # not logged
    flip(run.model.layers[1].bias)  # type: ignore[arg-type]
    run.log = RunLog(tmp_path / "b", run.model, run.optimizer)
    run.train(4, 4)
    text = diff(a, tmp_path / "b", capsys, 1)
    assert "batches differ" not in text
    assert "parameters differ first at update 3: layers.1.bias\n" in text
    assert "more of 8" not in text
    assert "the batches are equal: the cause is the weights at the start, the options or the arithmetic\n" in text


def test_weights_at_the_start(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b")
    flip(run.model.embed.weight, 22)
    run.train(1, 2)
    assert "parameters differ first at update 0: embed.weight\n" in diff(a, tmp_path / "b", capsys, 1)


def test_only_some_updates_have_parameters(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "b", every=2).train(1, 5, swap=3)
    text = diff(a, tmp_path / "b", capsys, 1)
    assert "batches differ first at update 3: micro-batch 1 of 0 to 1\n" in text
    assert "parameters differ first at update 4 (equal at update 2): embed.weight\n" in text
    assert "the cause: the batch\n" in text
    assert [bool(record.root) for record in read_log(tmp_path / "b").records.values()] == [True, False] * 3


def test_facts_that_differ_are_shown(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    Run(tmp_path / "b").train(1, 1)
    text = diff(a, tmp_path / "b", capsys, 0)
    assert text.endswith(f"equal\nthe runs also differ in:\n  threads: {threads} and {threads + 1}\n")
    facts = read_log(a).records[1].header.facts
    assert facts["torch"] == torch.__version__
    assert facts["CPU capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["ranks"] == 1


def test_batches_of_one_run_only(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b")
    for update in range(1, 3):
        for number in range(2):
            run.model(batch_of(update, number)["x"]).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    text = diff(a, tmp_path / "b", capsys, 0)
    assert "batches: not compared" in text
    assert "equal\n" in text


def test_a_skipped_update_is_none(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "b", max_grad_norm=1e9).train(1, 5)
    run = Run(tmp_path / "c", max_grad_norm=1e9).train(1, 2)
    run.log.batch(batch_of(50))
    run.model(batch_of(50)["x"] * torch.inf).mean().backward()
    run.optimizer.step()
    assert run.optimizer.step_was_skipped
    run.optimizer.zero_grad()
    run.train(3, 5)
    assert diff(tmp_path / "b", tmp_path / "c", capsys, 0) == "compared: 6 updates, 0 to 5\nequal\n"


def test_channels_last_is_the_same_run(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Convolutions differ in the last bits, so the weights are compared before training only.
    run = Run(tmp_path / "b")
    to_memory_format(run.model, torch.channels_last)
    run.train(1, 1)
    assert read_log(tmp_path / "b").records[0].root == read_log(a).records[0].root


# ---------------------------------------------------------------- resume and kill


def resumed(path: Path, checkpoint: Path) -> Run:
    run = Run(path)
    load(checkpoint, run.model, run.optimizer)
    return run


def test_a_resumed_run_continues_its_log(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 3)
    save(tmp_path / "c", run.model, run.optimizer)
    run.train(4, 4)
    resumed(tmp_path / "b", tmp_path / "c").train(4, 5)
    assert diff(a, tmp_path / "b", capsys, 0) == "compared: 6 updates, 0 to 5\nequal\n"
    text = diff(tmp_path / "b", tmp_path / "b", capsys, 0)
    assert text == "compared: 2 updates that were logged again after a resume, from 3 on\nequal\n"
    assert read_log(tmp_path / "b").records[3].batch_count == 2  # of the update itself, before the resume


def test_a_resumed_run_that_parts_from_itself(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 3)
    save(tmp_path / "c", run.model, run.optimizer)
    run.train(4, 5, swap=4)
    resumed(tmp_path / "b", tmp_path / "c").train(4, 5)
    text = diff(a, tmp_path / "b", capsys, 0)  # the later lines count
    assert "equal\nB was resumed, and differs from its updates before: dist-adamw diff B B\n" in text
    text = diff(tmp_path / "b", tmp_path / "b", capsys, 1)
    assert "compared: 3 updates that were logged again after a resume, from 3 on\n" in text
    assert "batches differ first at update 4: micro-batch 1 of 0 to 1\n" in text
    assert "parameters differ first at update 4: embed.weight\n" in text


def test_weights_that_a_resume_did_not_restore(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 3)
    save(tmp_path / "c", run.model, run.optimizer)
    again = resumed(tmp_path / "b", tmp_path / "c")
    flip(again.model.head.bias)
    again.train(4, 5)
    text = diff(tmp_path / "b", tmp_path / "b", capsys, 1)
    assert "parameters differ first at update 3: head.bias\n" in text


def test_updates_beyond_a_resume_do_not_count(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 2)
    save(tmp_path / "c", run.model, run.optimizer)
    run.train(3, 5, swap=4)
    resumed(tmp_path / "b", tmp_path / "c").train(3, 3)
    assert diff(a, tmp_path / "b", capsys, 0) == "compared: 4 updates, 0 to 3\nequal\n"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line(cut: int, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 3)
    save(tmp_path / "c", run.model, run.optimizer)
    run.train(4, 4)
    run.log.close()
    file = tmp_path / "b" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-cut])
    assert diff(a, tmp_path / "b", capsys, 0) == "compared: 4 updates, 0 to 3\nequal\n"
    resumed(tmp_path / "b", tmp_path / "c").train(4, 5)
    text = diff(a, tmp_path / "b", capsys, 0)
    damaged = "" if cut == 1 else "B has 1 damaged line, which was left out\n"  # only its line feed was missing
    assert text == f"compared: 6 updates, 0 to 5\nequal\n{damaged}"


def test_half_a_header(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    for size in (5, 200):
        (tmp_path / "b" / FILE_NAME).write_bytes((a / FILE_NAME).read_bytes()[:size])
        assert "has no updates yet" in diff(a, tmp_path / "b", capsys, 2)
        if size == 200:
            Run(tmp_path / "b").train(1, 5)
    text = diff(a, tmp_path / "b", capsys, 0)
    assert text == "compared: 6 updates, 0 to 5\nequal\nB has 1 damaged line, which was left out\n"


def test_a_damaged_line_in_the_middle(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "b").train(1, 5)
    file = tmp_path / "b" / FILE_NAME
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(lines[3][4:5], b"x" if lines[3][4:5] != b"x" else b"y", 1)
    file.write_bytes(b"".join(lines))
    text = diff(a, tmp_path / "b", capsys, 0)
    assert text == "compared: 5 updates, 0 to 5\nequal\nB has 1 damaged line, which was left out\n"


KILLED = """
import sys, os, signal
from pathlib import Path
from tests.unit.test_run_log import Run
run = Run(Path(sys.argv[1]))
run.train(1, 3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_every_update(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "b")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    text = diff(a, tmp_path / "b", capsys, 0)
    assert text.startswith("compared: 4 updates, 0 to 3\nequal\n")


def test_a_full_disk_does_not_end_training(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "b").train(1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "b" / FILE_NAME).stat().st_size + 20, limits[1]))
        with pytest.warns(UserWarning, match=r"update 3 is missing in the run log: .*\. Training continues\."):
            run.train(3, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    run.train(4, 5)
    text = diff(a, tmp_path / "b", capsys, 0)
    assert text == "compared: 5 updates, 0 to 5\nequal\nB has 1 damaged line, which was left out\n"


# ---------------------------------------------------------------- mistakes


def test_mistakes_of_diff(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist. Pass the folder" in diff(a, tmp_path / "none", capsys, 2)
    (tmp_path / "text").write_text("hello\n")
    assert "text is not a run log" in diff(a, tmp_path / "text", capsys, 2)
    model = nn.Linear(16, 1)
    optimizer = DistAdamW(model.parameters())
    RunLog(tmp_path / "b", model, optimizer)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    assert "the parameter 'embed.weight' is only in run A" in diff(a, tmp_path / "b", capsys, 2)
    lines = (a / FILE_NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / "late").write_bytes(lines[0] + lines[5] + lines[6])
    (tmp_path / "early").write_bytes(lines[0] + lines[1] + lines[2])
    text = diff(tmp_path / "early", tmp_path / "late", capsys, 2)
    assert "no update is in both runs: A has updates 0 to 1, and B has updates 4 to 5" in text


def test_mistakes_of_a_log(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"needs a DistAdamW.*got SGD"):
        RunLog(tmp_path, model, torch.optim.SGD(model.parameters()))
    optimizer = DistAdamW(model.parameters())
    for every in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=rf"every must be an integer >= 1, got {every!r}"):
            RunLog(tmp_path, model, optimizer, every=every)  # type: ignore[arg-type]
    (tmp_path / FILE_NAME).write_text("mine\n")
    with pytest.raises(ValueError, match="is not a run log, and nothing was written to it"):
        RunLog(tmp_path, model, optimizer)
    assert (tmp_path / FILE_NAME).read_text() == "mine\n"
    with pytest.raises(ValueError, match=r"Not a directory|File exists"):
        RunLog(tmp_path / FILE_NAME, model, optimizer)
    assert not optimizer._optimizer_step_post_hooks
    vars(model.weight)["ds_id"] = 3
    with pytest.raises(ValueError, match="cannot read the parameters of DeepSpeed ZeRO-3"):
        RunLog(tmp_path / "other", model, optimizer)


def _lock(path: Path) -> bool:
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    run = Run(tmp_path / "a").train(1, 1)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert f"another process writes to {tmp_path / 'a' / FILE_NAME}. Choose another folder." in done.stderr
    run.log.close()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_lock, [tmp_path / "a" / FILE_NAME])


def test_a_second_log_takes_the_place_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "a").train(1, 2)
    run.log = RunLog(tmp_path / "a", run.model, run.optimizer)
    run.train(3, 5)
    assert [line.count(" ") for line in (tmp_path / "a" / FILE_NAME).read_text().splitlines()][-3:] == [4, 4, 4]
    log = read_log(tmp_path / "a")
    assert len(log.replaced) == 1  # update 2: the weights that the second log found
    assert list(log.records) == [0, 1, 2, 3, 4, 5]
    run.log.close()
    size = os.path.getsize(tmp_path / "a" / FILE_NAME)
    run.train(6, 6)
    assert os.path.getsize(tmp_path / "a" / FILE_NAME) == size


GOLDEN = ("dcd2b3f00f9e0dfe", "1d04427eae5daa78")
