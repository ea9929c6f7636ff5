"""DeepSpeed alone: ``deepspeed.initialize`` with ZeRO-2, no Accelerate.

    deepspeed examples/deepspeed_initialize.py --out runs/zero
    torchrun --nproc_per_node 2 examples/deepspeed_initialize.py --out runs/zero --resume

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dist_adamw  # dist_adamw
from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW  # dist_adamw

BATCH = 32  # samples of one update, on all ranks together
CONFIG = {
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # dist_adamw
}


def waves(count: int) -> TensorDataset:
    x = torch.rand(count, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2
    return TensorDataset(x, torch.sin(3 * x[:, :2]) * x[:, 2:4])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/zero")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096, help="of one epoch, a multiple of the batch")
    parser.add_argument("--save_every", type=int, default=2048, help="samples from one checkpoint to the next")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    parser.add_argument("--local_rank", type=int, help="what the deepspeed launcher passes")
    args = parser.parse_args()

    dist_adamw.register_deepspeed()  # dist_adamw
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    data = waves(args.samples)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH // ranks, sampler=sampler)
    model = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    optimizer = DistAdamW(model.parameters(), lr=3e-3, weight_decay=0.05)  # dist_adamw
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, len(data), restart_period="1 epoch", t_mult=2)  # dist_adamw
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=CONFIG)
    dist_adamw.prepare_deepspeed(engine)  # dist_adamw
    folder = CheckpointFolder(f"{args.out}/checkpoints", every=args.save_every)  # dist_adamw
    if args.resume and (newest := folder.newest()) is not None:  # dist_adamw
        engine.load_checkpoint(str(newest))  # dist_adamw

    # DistributedSampler deals the same global batches to any number of ranks, so the clock tells what is left.
    first_epoch, done = divmod(scheduler.samples, len(data))  # dist_adamw
    for epoch in range(first_epoch, args.epochs):  # dist_adamw
        sampler.set_epoch(epoch)
        for number, (x, y) in enumerate(loader):
            if epoch == first_epoch and number * BATCH < done:  # dist_adamw
                continue  # dist_adamw
            samples, lr = scheduler.samples, scheduler.get_last_lr()[0]  # dist_adamw
            loss = nn.functional.mse_loss(engine(x.to(engine.device)), y.to(engine.device))
            engine.backward(loss)
            engine.step()
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"samples {samples} lr {lr!r} loss {float(mean):.6f}", flush=True)
            if folder.is_due(scheduler.samples):  # dist_adamw
                folder.save(scheduler.samples, lambda path: engine.save_checkpoint(str(path)))  # dist_adamw
            if samples + BATCH == args.stop_at:
                dist.destroy_process_group()
                return
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
