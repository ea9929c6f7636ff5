"""fp16's loss scaling: the weights, the scale and the clock of torch's own optimizers, and no wait for the device."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.amp.grad_scaler import GradScaler

from dist_adamw import CyclicLRWithRestarts, DistAdamW
from tests.pretend_cuda import Notes, pretending

ROOT = Path(__file__).parents[2]
UPDATES = 9
OVERFLOWS = (0, 1, 5)


class Supporting(GradScaler):
    """Records which optimizers got scaled gradients."""

    taken = 0

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> Any:
        self.taken += 1
        return super()._check_inf_per_device(optimizer)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def train(net: nn.Module, optimizer: Any, *, clip: float | None, unscales: bool, scale: float) -> tuple[list[Any], int]:
    """Train with overflows; return the scales, and how often the optimizer took scaled gradients."""
    scaler = Supporting("cpu", init_scale=scale, growth_interval=2)
    seen = []
    for n in range(UPDATES):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(n))
        loss = net(x).square().mean() * (math.inf if n in OVERFLOWS else 1.0)
        scaler.scale(loss).backward()
        if unscales or clip is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        grads = [param.grad.clone() for param in net.parameters() if param.grad is not None]
        optimizer.zero_grad()
        seen.append((scaler.get_scale(), grads))
    return seen, scaler.taken


@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"max_grad_norm": 1e-3}], ids=str)
def test_weights_and_scales_are_torchs(options: dict[str, Any], unscales: bool, scale: float) -> None:
    ours, theirs = model(), model()
    optimizer = DistAdamW(ours.parameters(), lr=0.1, eps=1e-3, **options)
    fused = options.get("fused", True)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, eps=1e-3, fused=fused, foreach=not fused)
    clip = options.get("max_grad_norm")
    found, taken = train(ours, optimizer, clip=None, unscales=unscales, scale=scale)
    # torch's fused kernel divides by the scale; its scaler multiplies by the inverse, as ours does.
    expected, _ = train(theirs, reference, clip=clip, unscales=True, scale=scale)
    assert taken == (0 if unscales else UPDATES)
    assert [one[0] for one in found] == [one[0] for one in expected]
    for n, ((_, grads), (_, references)) in enumerate(zip(found, expected, strict=True)):
        if clip is None and n not in OVERFLOWS:  # ours clips a copy
            assert all(map(torch.equal, grads, references))
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if clip is None:
            assert torch.equal(param, other)
        else:  # torch clips by a factor that it rounds elsewhere
            assert torch.allclose(param, other, rtol=1e-5, atol=1e-6)
    assert optimizer.updates == UPDATES - len(OVERFLOWS)


def test_a_skipped_update_changes_nothing_and_holds_the_clock() -> None:
    net = model()
    optimizer = DistAdamW(net.parameters(), lr=0.1)
    scheduler = CyclicLRWithRestarts(optimizer, batch_size=10, epoch_size=100)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    for overflows, samples, power in ((False, 10, 16), (True, 10, 15), (True, 10, 14), (False, 20, 14)):
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]))
        scaler.scale(net(torch.ones(2, 5)).sum() * (math.inf if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        assert (scheduler.samples, scaler.get_scale()) == (samples, 2.0**power)
        assert optimizer.step_was_skipped == overflows
        after = (net.state_dict(), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"])
        if overflows:
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_flag_that_counts_devices_skips() -> None:
    """The scaler adds the flags of all devices, and torch's kernels skip only if the sum is 1."""
    net = model()
    optimizer: Any = DistAdamW(net.parameters())
    net(torch.ones(2, 5)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(2.0), None
    optimizer.step()
    assert optimizer.step_was_skipped
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_accelerate_sees_an_overflow() -> None:
    """It takes an update for skipped if ``step`` was not called."""
    Accelerator(cpu=True)
    net = model()
    optimizer = DistAdamW(net.parameters())
    scaler = Supporting("cpu", init_scale=2.0**16)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    for overflows in (False, True, False):
        scaler.scale(net(torch.ones(2, 5)).sum() * (math.inf if overflows else 1.0)).backward()
        wrapped.step()
        wrapped.zero_grad()
        assert wrapped.step_was_skipped == overflows
    assert scaler.taken == 0
    assert optimizer.updates == 2


def test_only_a_scaler_is_told() -> None:
    """Lightning refuses to clip for optimizers that say so."""
    assert not getattr(DistAdamW(model().parameters()), "_step_supports_amp_scaling", False)


def test_fp16_gradients_are_refused_by_the_scaler() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = DistAdamW([param])
    scaler = GradScaler("cpu")
    scaler.scale(param.float().sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.step(optimizer)


# ---------------------------------------------------------------- on a device that pretends


def waits(notes: Notes, **options: Any) -> dict[str, Any]:
    """Return what the host waits for in the last of a few updates with a scaler."""
    params = [nn.Parameter(torch.randn(640, device="cuda:0")) for _ in range(3)]
    optimizer = DistAdamW(params, **options)
    scaler = Supporting("cpu", init_scale=2.0**16)  # one for "cuda" disables itself where torch knows no such device
    for _ in range(4):
        scaler.scale(torch.ones((), device="cuda:0"))  # makes the scale where the loss is
        for param in params:
            param.grad = torch.ones_like(param)
        notes.clear()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"waits": dict(notes.waits), "event waits": notes.event_waits, "taken": scaler.taken}


def main() -> list[dict[str, Any]]:
    with pretending() as notes:
        return [waits(notes), waits(notes, max_grad_norm=1.0)]


def test_the_host_never_waits() -> None:
    """In a process of its own, since pretending changes torch for good."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.test_grad_scaler"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    for counts in json.loads(done.stdout.splitlines()[-1]):
        # One event, recorded in the update before: the host is at most an update ahead.
        assert counts == {"waits": {}, "event waits": 1, "taken": 4}


if __name__ == "__main__":
    print(json.dumps(main()))
