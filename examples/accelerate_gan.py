"""A GAN in Accelerate's loop: two models, two optimizers and two schedulers in one call of ``prepare``.

    python examples/accelerate_gan.py --out runs/gan
    accelerate launch --num_processes 8 examples/accelerate_gan.py --out runs/gan --resume
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_gan.py --out runs/gan --resume

The data are points on a ring, each with the noise for one generated point: then the noise is the same on any number of
ranks, too.

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch  # dist_adamw

BATCH = 64  # samples of one update, on all ranks together
NOISE = 8


def ring(count: int, seed: int) -> TensorDataset:
    """Points near one of eight places on a circle, and noise."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (count,), generator=generator) * (torch.pi / 4)
    places = torch.stack([angle.cos(), angle.sin()], 1)
    points = places + 0.05 * torch.randn(count, 2, generator=generator)
    return TensorDataset(points, torch.randn(count, NOISE, generator=generator))


def network(inputs: int, outputs: int, width: int = 64) -> nn.Module:
    hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/gan")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4096, help="of one epoch")
    parser.add_argument("--save_every", type=int, default=4096, help="samples from one checkpoint to the next")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    loader = DataLoader(ring(args.samples, 1), BATCH // accelerator.num_processes, shuffle=True)
    eval_loader = DataLoader(ring(512, 2), 128)
    generator, critic = network(NOISE, 2), network(2, 1)
    optimizer_g = DistAdamW(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))  # dist_adamw
    optimizer_d = DistAdamW(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))  # dist_adamw
    scheduler_g = CyclicLRWithRestarts(optimizer_g, restart_period="2 epochs", t_mult=2)  # dist_adamw
    scheduler_d = CyclicLRWithRestarts(optimizer_d, restart_period="2 epochs", t_mult=2)  # dist_adamw
    objects = generator, critic, optimizer_g, optimizer_d, loader, eval_loader, scheduler_g, scheduler_d
    prepared = prepare(accelerator, *objects)  # dist_adamw
    generator, critic, optimizer_g, optimizer_d, loader, eval_loader, scheduler_g, scheduler_d = prepared
    folder = CheckpointFolder(f"{args.out}/checkpoints", every=args.save_every)  # dist_adamw
    if args.resume and (newest := folder.newest()) is not None:  # dist_adamw
        accelerator.load_state(str(newest))  # dist_adamw

    for epoch in range(position(loader).epoch, args.epochs):  # dist_adamw
        for real, noise in rest_of_epoch(loader):  # dist_adamw
            samples, lr = scheduler_g.samples, scheduler_g.get_last_lr()[0]  # dist_adamw
            fake = generator(noise)
            optimizer_d.zero_grad()
            scores = critic(torch.cat([real, fake.detach()]))
            loss_d = softplus(-scores[: len(real)]).mean() + softplus(scores[len(real) :]).mean()
            accelerator.backward(loss_d)
            optimizer_d.step()
            scheduler_d.step()
            optimizer_g.zero_grad()
            loss_g = softplus(-critic(fake)).mean()
            accelerator.backward(loss_g)
            optimizer_g.step()
            scheduler_g.step()
            mean = accelerator.reduce(torch.stack([loss_g, loss_d]).detach(), reduction="mean")
            accelerator.print(f"samples {samples} lr {lr!r} loss {mean[0]:.6f} critic {mean[1]:.6f}")
            if folder.is_due(scheduler_g.samples):  # dist_adamw
                folder.save(scheduler_g.samples, accelerator.save_state)  # dist_adamw
            if samples + BATCH == args.stop_at:
                accelerator.end_training()
                return
        with torch.no_grad():
            radii = torch.cat(
                [accelerator.gather_for_metrics(generator(noise).norm(dim=1)) for _, noise in eval_loader]
            )
        accelerator.print(f"epoch {epoch} radius {radii.mean():.3f}, and 1 is right")
    accelerator.end_training()


if __name__ == "__main__":
    main()
