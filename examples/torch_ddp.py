"""torch alone: DistributedDataParallel and torchrun, no Accelerate.

    torchrun --nproc_per_node 2 examples/torch_ddp.py --out runs/ddp
    torchrun --nproc_per_node 4 examples/torch_ddp.py --out runs/ddp --resume

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, load, save  # dist_adamw

BATCH = 32  # samples of one update, on all ranks together


def waves(count: int) -> TensorDataset:
    x = torch.rand(count, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2
    return TensorDataset(x, torch.sin(3 * x[:, :2]) * x[:, 2:4])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/ddp")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096, help="of one epoch, a multiple of the batch")
    parser.add_argument("--save_every", type=int, default=2048, help="samples from one checkpoint to the next")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    ranks = dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    data = waves(args.samples)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH // ranks, sampler=sampler)
    network = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    model = DistributedDataParallel(network.to(device), gradient_as_bucket_view=True)
    optimizer = DistAdamW(model.parameters(), lr=3e-3, weight_decay=0.05, max_grad_norm=1.0)  # dist_adamw
    optimizer.attach(model)  # dist_adamw
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, len(data), restart_period="1 epoch", t_mult=2)  # dist_adamw
    folder = CheckpointFolder(f"{args.out}/checkpoints", every=args.save_every)  # dist_adamw
    if args.resume and (newest := folder.newest()) is not None:  # dist_adamw
        load(newest, model, optimizer, scheduler)  # dist_adamw

    # DistributedSampler deals the same global batches to any number of ranks, so the clock tells what is left.
    first_epoch, done = divmod(scheduler.samples, len(data))  # dist_adamw
    for epoch in range(first_epoch, args.epochs):  # dist_adamw
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
            if dist.get_rank() == 0:
                print(f"samples {samples} lr {lr!r} loss {float(mean):.6f}", flush=True)
            if folder.is_due(scheduler.samples):  # dist_adamw
                folder.save(scheduler.samples, lambda path: save(path, model, optimizer, scheduler))  # dist_adamw
            if samples + BATCH == args.stop_at:
                dist.destroy_process_group()
                return
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
