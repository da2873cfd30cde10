"""An Accelerate script in the manner of its complete examples: checkpoints by steps, and a way to resume from them.

accelerate launch --cpu --num_processes 2 accelerate_complete.py --output_dir out --checkpointing_steps 20
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def newest(folder):
    steps = [int(p.name.removeprefix("step_")) for p in folder.glob("step_*") if (p / "done").exists()]
    return max(steps, default=None)


def training_function(args):
    accelerator = Accelerator()
    set_seed(args.seed)
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(pictures, torch.tensor(digits.target))
    train = DataLoader(data, batch_size=args.batch_size, shuffle=True)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=10_000)
    model, optimizer, train, scheduler = accelerator.prepare(model, optimizer, train, scheduler)
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.distributed_type}")

    output, overall_step = Path(args.output_dir), 0
    found = newest(output)
    if found is not None:
        accelerator.print(f"resuming from step {found}")
        accelerator.load_state(output / f"step_{found}")
        overall_step = found
    starting_epoch, resume_step = divmod(overall_step, len(train))
    for epoch in range(starting_epoch, args.num_epochs):
        model.train()
        active = accelerator.skip_first_batches(train, resume_step) if epoch == starting_epoch else train
        for inputs, targets in active:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            overall_step += 1
            if overall_step % args.checkpointing_steps == 0:
                accelerator.save_state(output / f"step_{overall_step}")
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    (output / f"step_{overall_step}" / "done").touch()
        accelerator.print(f"epoch {epoch}: loss {accelerator.gather(loss.detach()).mean().item():.4f}")
    accelerator.print(f"done after {overall_step} steps")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--checkpointing_steps", type=int, default=20)
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=42)
    training_function(parser.parse_args())
