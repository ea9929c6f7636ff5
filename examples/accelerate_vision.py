"""A convolutional network with BatchNorm in Accelerate's loop, which stops when it no longer gets better.

    python examples/accelerate_vision.py --out runs/vision
    accelerate launch --num_processes 8 examples/accelerate_vision.py --out runs/vision --resume
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_vision.py --out runs/vision --resume

BatchNorm depends on the micro-batch, so that is constant here, and the accumulation follows the number of ranks.

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, position, prepare  # dist_adamw

BATCH = 32  # samples of one update, on all ranks together
MICRO_BATCH = 8


def images(count: int, seed: int) -> TensorDataset:
    """Noisy gratings of four orientations."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.stack([torch.sin(1.2 * (x * a + y * b)) for a, b in ((1, 0), (0, 1), (0.7, 0.7), (0.7, -0.7))])
    return TensorDataset(waves[labels][:, None] + torch.randn(count, 1, 16, 16, generator=generator), labels)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class EarlyStop:
    """Counts epochs without a new best accuracy; a checkpoint has it."""

    def __init__(self) -> None:
        self.best, self.waited = 0.0, 0

    def see(self, accuracy: float) -> None:
        self.waited = 0 if accuracy > self.best else self.waited + 1
        self.best = max(self.best, accuracy)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/vision")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--samples", type=int, default=2048, help="of one epoch")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a new best accuracy")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = BATCH // (MICRO_BATCH * accelerator.num_processes)
    set_seed(0)
    loader = DataLoader(images(args.samples, 1), MICRO_BATCH, shuffle=True)
    eval_loader = DataLoader(images(100, 2), 50)
    model: nn.Module = nn.Sequential(block(1, 8), block(8, 16), block(16, 32), nn.Flatten(), nn.Linear(128, 4))
    optimizer = DistAdamW(model.parameters(), lr=3e-3, weight_decay=0.05)  # dist_adamw
    scheduler = CyclicLRWithRestarts(optimizer, restart_period="1 epoch", t_mult=2)  # dist_adamw
    prepared = prepare(accelerator, model, optimizer, loader, eval_loader, scheduler)  # dist_adamw
    model, optimizer, loader, eval_loader, scheduler = prepared
    stop = EarlyStop()
    accelerator.register_for_checkpointing(stop)
    folder = CheckpointFolder(f"{args.out}/checkpoints")  # dist_adamw
    if args.resume and (newest := folder.newest()) is not None:  # dist_adamw
        accelerator.load_state(str(newest))  # dist_adamw

    for epoch in range(position(loader).epoch, args.epochs):  # dist_adamw
        if stop.waited >= args.patience:
            break
        model.train()
        losses: list[Tensor] = []
        for image, label in loader:
            samples, lr = scheduler.samples, scheduler.get_last_lr()[0]  # dist_adamw
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(image), label)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
                accelerator.print(f"samples {samples} lr {lr!r} loss {float(mean):.6f}")
                losses.clear()
            if scheduler.samples == args.stop_at:  # dist_adamw
                accelerator.end_training()
                return
        model.eval()
        hits: list[Tensor] = []
        with torch.no_grad():
            for image, label in eval_loader:
                hits.append(accelerator.gather_for_metrics(model(image).argmax(1) == label))
        stop.see(float(torch.cat(hits).float().mean()))
        accelerator.print(f"epoch {epoch} best accuracy {stop.best:.3f}, {stop.waited} epochs ago")
        folder.save(scheduler.samples, accelerator.save_state)  # dist_adamw
    accelerator.end_training()


if __name__ == "__main__":
    main()
