"""A GPT of transformers in Accelerate's loop, with a loader for evaluation, on any engine that Accelerate starts.

    python examples/accelerate_causal_lm.py --out runs/lm
    accelerate launch --num_processes 8 examples/accelerate_causal_lm.py --out runs/lm --resume
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_causal_lm.py --out runs/lm --resume

Lines marked "# dist_adamw" differ from the script with torch.optim.AdamW and torch's scheduler.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch  # dist_adamw

BATCH = 16  # samples of one update, on all ranks together
CONTEXT = 64  # bytes of one sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/lm")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1024, help="of one epoch")
    parser.add_argument("--save_every", type=int, default=512, help="samples from one checkpoint to the next")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))  # a text that every Python has
    windows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    train, held_out = windows[64 : 64 + args.samples], windows[:64]
    micro_batch = BATCH // accelerator.num_processes
    loader = DataLoader(train, micro_batch, shuffle=True)
    eval_loader = DataLoader(held_out, 32)
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    # Dropout would draw other numbers on another number of ranks.
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = DistAdamW(model.parameters(), lr=2e-3, weight_decay=0.05)  # dist_adamw
    scheduler = CyclicLRWithRestarts(optimizer, restart_period="1 epoch", t_mult=2, warmup_samples=64)  # dist_adamw
    prepared = prepare(accelerator, model, optimizer, loader, eval_loader, scheduler)  # dist_adamw
    model, optimizer, loader, eval_loader, scheduler = prepared
    folder = CheckpointFolder(f"{args.out}/checkpoints", every=args.save_every)  # dist_adamw
    if args.resume and (newest := folder.newest()) is not None:  # dist_adamw
        accelerator.load_state(str(newest))  # dist_adamw

    for epoch in range(position(loader).epoch, args.epochs):  # dist_adamw
        model.train()
        for batch in rest_of_epoch(loader):  # dist_adamw
            samples, lr = scheduler.samples, scheduler.get_last_lr()[0]  # dist_adamw
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            mean = accelerator.reduce(loss.detach(), reduction="mean")
            accelerator.print(f"samples {samples} lr {lr!r} loss {float(mean):.6f}")
            if folder.is_due(scheduler.samples):  # dist_adamw
                folder.save(scheduler.samples, accelerator.save_state)  # dist_adamw
            if samples + BATCH == args.stop_at:
                accelerator.end_training()
                return
        model.eval()
        with torch.no_grad():
            losses = [accelerator.gather(model(input_ids=x, labels=x).loss) for x in eval_loader]
        accelerator.print(f"epoch {epoch} held-out loss {float(torch.stack(losses).mean()):.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
