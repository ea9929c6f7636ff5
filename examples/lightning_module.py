"""A LightningModule and Lightning's Trainer.

    python examples/lightning_module.py --out runs/lightning                         # one process
    python examples/lightning_module.py --out runs/lightning --ranks 2 --resume      # Lightning starts the ranks
    torchrun --nproc_per_node 2 examples/lightning_module.py --out runs/lightning --resume

Needs Lightning: pip install 'dist_adamw[lightning]'. Lines marked "# dist_adamw" differ from the script with
torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare_lightning  # dist_adamw

BATCH = 32  # samples of one update, on all ranks together


def waves(count: int) -> TensorDataset:
    x = torch.rand(count, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2
    return TensorDataset(x, torch.sin(3 * x[:, :2]) * x[:, 2:4])


class Waves(L.LightningModule):  # type: ignore[misc,unused-ignore]
    def __init__(self, samples: int, stop_at: int | None) -> None:
        super().__init__()
        self.samples, self.stop_at = samples, stop_at
        self.network = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning would shuffle otherwise on one device. With this sampler global batches are the same on any number.
        data, ranks = waves(self.samples), self.trainer.world_size
        return DataLoader(data, BATCH // ranks, sampler=DistributedSampler(data, ranks, self.trainer.global_rank))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = DistAdamW(self.parameters(), lr=3e-3, weight_decay=0.05)  # dist_adamw
        scheduler = CyclicLRWithRestarts(optimizer, restart_period="1 epoch", t_mult=2)  # dist_adamw
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        scheduler: Any = self.lr_schedulers()
        self.row = f"samples {scheduler.samples} lr {scheduler.get_last_lr()[0]!r}"  # dist_adamw

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = self.trainer.strategy.reduce(outputs["loss"], reduce_op="mean")
        self.print(f"{self.row} loss {float(loss):.6f}", flush=True)
        scheduler: Any = self.lr_schedulers()  # dist_adamw
        if scheduler.samples == self.stop_at:  # dist_adamw
            raise SystemExit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    parser.add_argument("--ranks", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096, help="of one epoch, a multiple of the batch")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    L.seed_everything(0)
    folder = Path(args.out) / "checkpoints"
    trainer = L.Trainer(
        devices=args.ranks,
        strategy="auto" if args.ranks == 1 else "ddp",
        max_epochs=args.epochs,
        callbacks=[ModelCheckpoint(folder, save_last=True, save_top_k=1, save_on_train_epoch_end=True)],
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = prepare_lightning(trainer)  # dist_adamw
    last = folder / "last.ckpt"
    resumed = str(last) if args.resume and last.exists() else None
    trainer.fit(Waves(args.samples, args.stop_at), ckpt_path=resumed)


if __name__ == "__main__":
    main()
