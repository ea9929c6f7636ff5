"""Supervised fine-tuning with TRL's SFTTrainer (pip install trl).

    python examples/trainer_trl.py --out runs/sft
    torchrun --nproc_per_node 2 examples/trainer_trl.py --out runs/sft --resume

The model has random weights here; with your own, ``from_pretrained`` takes the place of the config.

Lines marked "# dist_adamw" differ from the script with SFTTrainer's own AdamW and scheduler.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from datasets import Dataset
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from dist_adamw import prepare_trainer  # dist_adamw

BATCH = 16  # samples of one update, on all ranks together
CONTEXT = 64  # bytes of one sample


class Print(TrainerCallback):
    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at

    def on_log(self, args, state, control, logs, **_):
        if state.is_world_process_zero and "loss" in logs:
            print(f"update {state.global_step} lr {logs['learning_rate']!r} loss {logs['loss']:.6f}", flush=True)

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step * BATCH == self.stop_at


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/sft")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1024, help="of one epoch")
    parser.add_argument("--save_every", type=int, default=512, help="samples from one checkpoint to the next")
    parser.add_argument("--stop_at", type=int, help="end after so many samples, as if killed")
    args = parser.parse_args()

    set_seed(0)
    text = Path(argparse.__file__).read_text()  # a text that every Python has
    data = Dataset.from_list([{"text": text[i * CONTEXT : (i + 1) * CONTEXT]} for i in range(args.samples)])
    sizes = {"vocab_size": 384, "n_positions": 2 * CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    # Dropout would draw other numbers on another number of ranks.
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    arguments = SFTConfig(
        output_dir=args.out,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        num_train_epochs=args.epochs,
        learning_rate=2e-3,
        weight_decay=0.05,
        logging_steps=1,
        save_steps=args.save_every // BATCH,
        save_total_limit=3,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, processing_class=ByT5Tokenizer(), callbacks=[Print(args.stop_at)]
    )
    trainer = prepare_trainer(trainer, scheduler={"restart_period": "1 epoch", "t_mult": 2})  # dist_adamw
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out) if args.resume else None)


if __name__ == "__main__":
    main()
