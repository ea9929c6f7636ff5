"""A job whose recipe is a DeepSpeed JSON: no optimizer and no schedule in the code.

    deepspeed --num_accelerators 2 launch/train_json.py configs/deepspeed/adamwr_zero2.json
    accelerate launch --num_processes 2 --multi_gpu launch/train_json.py configs/deepspeed/adamwr_zero2.json
    torchrun --nproc-per-node 2 launch/train_json.py configs/deepspeed/adamwr_zero2.json

Prints one line per update on the main rank: samples, lr, weight decay and loss over the global batch.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, InitProcessGroupKwargs, set_seed
from gpt import GPT, ModelConfig, next_byte_losses
from text import TextConfig, load_text
from torch.utils.data import DataLoader

import dist_adamw


def main() -> None:
    """Train as the command line and the JSON say. Collective."""
    parser = argparse.ArgumentParser(description="Train with a DeepSpeed JSON for a recipe.")
    parser.add_argument("config", help="DeepSpeed's JSON")
    parser.add_argument("--cycles", type=int, default=1, help="train to the end of so many cycles")
    parser.add_argument("--updates", type=int, help="stop after so many, wherever that is in a cycle")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--max_bytes", type=int, default=300_000)
    parser.add_argument("--local_rank", type=int, help="what the deepspeed launcher passes")
    options = parser.parse_args()
    dist_adamw.register_deepspeed()
    on_cpu = not torch.cuda.is_available()  # there every rank would think that it is alone
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=options.config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
    )
    set_seed(0)
    sizes = ModelConfig()
    model = GPT(sizes)
    batch = options.micro_batch * accelerator.num_processes
    text = load_text(None, TextConfig(max_bytes=options.max_bytes), context=sizes.context, global_batch=batch)
    loader = DataLoader(text.training, options.micro_batch, drop_last=True)
    optimizer = DummyOptim(model.parameters())
    model, optimizer, loader, scheduler = dist_adamw.prepare(
        accelerator, model, optimizer, loader, DummyScheduler(optimizer)
    )
    last = scheduler.preview(cycles=options.cycles).rows[-1]
    end = last.first_sample + last.samples
    updates = 0
    losses: list[torch.Tensor] = []  # of the update so far
    while scheduler.samples < end and updates != options.updates:
        for windows in loader:
            samples, lr, decay = scheduler.samples, scheduler.get_last_lr()[0], scheduler.get_last_weight_decay()[0]
            with accelerator.accumulate(model):
                loss = next_byte_losses(model, windows).mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
            losses.clear()
            accelerator.print(f"samples {samples} lr {lr!r} weight_decay {decay!r} loss {float(mean):.6f}")
            updates += 1
            if scheduler.samples >= end or updates == options.updates:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
