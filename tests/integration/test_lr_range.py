"""``dist-adamw lr-range``, really launched: on a small script, and on the main job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.integration.test_train import TIMEOUT, environment

SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, prepare, save

def main(folder, lr):
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = DistAdamW(model.parameters(), lr=float(lr))
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    x = torch.randn(192, 6)
    loader = DataLoader(TensorDataset(x, 2 * x[:, :2].sin()), batch_size=4, shuffle=True)
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    checkpoints = CheckpointFolder(f"{folder}/checkpoints", keep=1, every=16)
    try:
        for epoch in range(100):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if checkpoints.is_due(scheduler.samples):
                    checkpoints.save(scheduler.samples, accelerator.save_state)
                    accelerator.save_state(f"{folder}/state")
                    save(f"{folder}/ours", model, optimizer, scheduler)
                if MISTAKE and epoch == 1:
                    raise KeyError("the script's own mistake")
    except RuntimeError as error:
        print("swallowed", error)
    finally:
        torch.save(model.state_dict(), f"{folder}/last.pt")
    print("the script goes on after its loop")

if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit(0)
"""


def lr_range(*args: str, stderr: int = subprocess.STDOUT) -> tuple[int, str]:
    """Run the command; its exit status, and everything that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dist_adamw.cli", "lr-range", *args],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, done.stdout


def write(folder: Path, mistake: bool = False) -> str:
    path = folder / "script.py"
    path.write_text(SCRIPT.replace("MISTAKE", str(mistake)))
    return str(path)


def test_a_script_ends_at_divergence_and_nothing_is_saved(tmp_path: Path) -> None:
    (tmp_path / "out/checkpoints/sample-000000008").mkdir(parents=True)
    picture = tmp_path / "x.png"
    options = ["--highest=1e3", "--updates", "120", "--out", str(picture)]
    status, output = lr_range(*options, write(tmp_path), str(tmp_path / "out"), "1e-3")
    assert status == 0, output
    assert "Traceback" not in output
    assert "goes on after its loop" not in output
    assert output.count("diverged: the loss rose to") == 1
    assert output.count("suggested: lr from") == 1
    assert output.count("accelerator.save_state writes nothing during a range test") == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    left = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*"))
    assert [str(path) for path in left if "lock" not in path.name] == ["checkpoints", "checkpoints/sample-000000008"]


def test_a_mistake_of_the_script_is_its_own(tmp_path: Path) -> None:
    status, output = lr_range(write(tmp_path, mistake=True), str(tmp_path), "1e-3")
    assert status == 1
    assert "Traceback" in output
    assert 'KeyError: "the script\'s own mistake"' in output
    (tmp_path / "other.py").write_text("print('no prepare here')")
    status, output = lr_range(str(tmp_path / "other.py"))
    assert status == 2
    assert output.splitlines()[-1].startswith("dist-adamw lr-range: the script has not called dist_adamw.prepare")


def test_the_error_of_a_launched_script_is_the_last_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nif os.environ['RANK'] == '1':\n    raise KeyError('its own')\nimport time; time.sleep(60)"
    )
    status, output = lr_range("--ranks=2", str(script))
    assert status == 1
    assert output.count("Traceback") == 1
    assert "ChildFailedError" not in output
    assert output.splitlines()[-1] == f"dist-adamw lr-range: {script} raised KeyError: 'its own' (rank 1)."


def test_the_main_job_keeps_its_checkpoints(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints/sample-000000008").mkdir(parents=True)
    tiny = ["--config", str(ROOT / "configs/train/tiny.yaml"), "--run.tracker", "none", "--out", str(out)]
    options = ["--ranks=2", "--lowest=1e-4", "--updates=40", "--highest", "100", f"--out={tmp_path / 'x.png'}"]
    script = str(ROOT / "launch/train.py")
    arguments = [*options, "--json", script, *tiny, "--run.overwrite", "true", "--run.save_every", "16"]
    status, output = lr_range(*arguments, stderr=subprocess.DEVNULL)
    assert status == 0, output
    found = json.loads(output)  # what the job prints is on stderr
    assert found["ended_by"].startswith("diverged")
    assert found["suggested_min"] < found["suggested_max"]
    assert len(found["lrs"]) == len(found["losses"]) == len(found["smoothed"])
    assert found["written"] == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
    assert [path.name for path in (out / "checkpoints").glob("sample-*")] == ["sample-000000008"]
