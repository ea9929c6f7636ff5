"""Ray Train's TorchTrainer, on any number of workers, which Ray starts and restarts.

    python examples/ray_train.py --out runs/ray --ranks 2
    python examples/ray_train.py --out runs/ray --ranks 4 --resume

Needs Ray: pip install 'ray[train]>=2.60'. After a failure Ray calls the training loop again, which continues from the
newest checkpoint. With ``--ranks 1 2`` Ray starts one worker or two, as many as it has CPUs or GPUs for,
and changes their number when machines join or leave. On several machines they must share the file system of --out.

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, load, save  # dist_adamw

BATCH = 32  # samples of one update, on all workers together


def waves(count: int) -> TensorDataset:
    x = torch.rand(count, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2
    return TensorDataset(x, torch.sin(3 * x[:, :2]) * x[:, 2:4])


def train_loop(config: dict[str, Any]) -> list[str]:
    """Train on this worker; return a line for each update, which Ray passes on from rank 0."""
    ranks, rank = dist.get_world_size(), dist.get_rank()  # Ray has made the process group
    if BATCH % ranks:
        raise ValueError(f"the batch of {BATCH} samples is not a multiple of {ranks} workers")
    device = get_device()
    torch.manual_seed(0)
    data = waves(config["samples"])
    sampler = DistributedSampler(data, ranks, rank)
    loader = DataLoader(data, BATCH // ranks, sampler=sampler)
    network = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    model = prepare_model(network)  # on several workers: DDP
    optimizer = DistAdamW(model.parameters(), lr=3e-3, weight_decay=0.05, max_grad_norm=1.0)  # dist_adamw
    optimizer.attach(model)  # dist_adamw
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, len(data), restart_period="1 epoch", t_mult=2)  # dist_adamw
    folder = CheckpointFolder(f"{config['out']}/checkpoints", every=config["save_every"])  # dist_adamw
    if (newest := folder.newest()) is not None:  # dist_adamw
        load(newest, model, optimizer, scheduler)  # dist_adamw

    # DistributedSampler deals the same global batches to any number of ranks, so the clock tells what is left.
    first_epoch, done = divmod(scheduler.samples, len(data))  # dist_adamw
    rows: list[str] = []
    for epoch in range(first_epoch, config["epochs"]):  # dist_adamw
        sampler.set_epoch(epoch)
        for number, (x, y) in enumerate(loader):
            if epoch == first_epoch and number * BATCH < done:  # dist_adamw
                continue  # dist_adamw
            samples, lr = scheduler.samples, scheduler.get_last_lr()[0]  # dist_adamw
            loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            rows.append(f"samples {samples} lr {lr!r} loss {float(mean):.6f}")
            if folder.is_due(scheduler.samples):  # dist_adamw
                folder.save(scheduler.samples, lambda path: save(path, model, optimizer, scheduler))  # dist_adamw
            if samples + BATCH == config["stop_at"]:
                return rows
        ray.train.report({"epoch": epoch, "loss": float(mean)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/ray")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="workers, or the fewest and the most")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096, help="of one epoch, a multiple of the batch")
    parser.add_argument("--save_every", type=int, default=2048, help="samples from one checkpoint to the next")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    out = Path(args.out).absolute()
    if not args.resume and any(out.glob("checkpoints/sample-*")):
        sys.exit(f"{out} has checkpoints. Pass --resume, or another --out.")
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={**vars(args), "out": str(out)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.ranks[0] if len(args.ranks) == 1 else tuple(args.ranks), use_gpu=torch.cuda.is_available()
        ),
        run_config=ray.train.RunConfig(
            storage_path=str(out / "ray"), failure_config=ray.train.FailureConfig(max_failures=3)
        ),
    )
    print("\n".join(trainer.fit().return_value))


if __name__ == "__main__":
    main()
