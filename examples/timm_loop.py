"""A vision transformer of timm, with layer-wise decay, in a loop like that of timm's train.py.

    torchrun --nproc_per_node 1 examples/timm_loop.py --out runs/timm
    torchrun --nproc_per_node 2 examples/timm_loop.py --out runs/timm --resume

Needs timm. In timm's own train.py the same lines change: step() takes the place of step_update(num_updates), the call
of step(epoch, metric) after each epoch is left out, and save and load take the place of CheckpointSaver and
resume_checkpoint, which handle only one rank's share of the optimizer.

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and timm's scheduler.
"""

from __future__ import annotations

import argparse
import os

import timm
import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, load, save  # dist_adamw

BATCH = 32  # samples of one update, on all ranks together


def images(count: int) -> TensorDataset:
    """Noisy gratings of four orientations."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.stack([torch.sin(1.2 * (x * a + y * b)) for a, b in ((1, 0), (0, 1), (0.7, 0.7), (0.7, -0.7))])
    return TensorDataset(waves[labels][:, None] + torch.randn(count, 3, 16, 16, generator=generator), labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/timm")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1024, help="of one epoch, a multiple of the batch")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    ranks = dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    data = images(args.samples)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, BATCH // ranks, sampler=sampler)
    network = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=96, num_classes=4)
    # Before DDP, whose names would all lie in one layer.
    groups = param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.75)
    model = DistributedDataParallel(network.to(device), gradient_as_bucket_view=True)
    optimizer = DistAdamW(groups, lr=1e-3, max_grad_norm=1.0)  # dist_adamw
    optimizer.attach(model)  # dist_adamw
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, len(data), restart_period="1 epoch", t_mult=2)  # dist_adamw
    folder = CheckpointFolder(f"{args.out}/checkpoints")  # dist_adamw
    if args.resume and (newest := folder.newest()) is not None:  # dist_adamw
        load(newest, model, optimizer, scheduler)  # dist_adamw

    for epoch in range(scheduler.samples // len(data), args.epochs):  # dist_adamw
        sampler.set_epoch(epoch)
        for image, label in loader:  # dist_adamw
            # The last group's lr is that of the head, which has lr_scale 1.
            samples, lr = scheduler.samples, scheduler.get_last_lr()[-1]  # dist_adamw
            loss = nn.functional.cross_entropy(model(image.to(device)), label.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()  # dist_adamw
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"samples {samples} lr {lr!r} loss {float(mean):.6f}", flush=True)
            if samples + BATCH == args.stop_at:
                dist.destroy_process_group()
                return
        folder.save(scheduler.samples, lambda path: save(path, model, optimizer, scheduler))  # dist_adamw
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
