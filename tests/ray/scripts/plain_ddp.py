"""A plain DDP script as one writes it for `torchrun`: a trainer class that saves a snapshot and starts from it.

torchrun --nproc-per-node 2 plain_ddp.py 20 --save-every 2 --snapshot snapshot.pt
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Trainer:
    def __init__(self, model, loader, optimizer, save_every, snapshot):
        self.rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.loader, self.optimizer = loader, optimizer
        self.save_every, self.snapshot = save_every, Path(snapshot)
        self.epochs_run = 0
        if self.snapshot.exists():
            saved = torch.load(self.snapshot)
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.epochs_run = saved["epochs_run"]
            print(f"[rank {self.rank}] resuming from epoch {self.epochs_run}")
        self.model = DistributedDataParallel(model)

    def run_epoch(self, epoch):
        self.loader.sampler.set_epoch(epoch)
        for pictures, labels in self.loader:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(pictures), labels)
            loss.backward()
            self.optimizer.step()
        print(f"[rank {self.rank}] epoch {epoch} loss {loss.item():.4f}")

    def save(self, epoch):
        state = {"model": self.model.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.snapshot.with_suffix(".partial")
        torch.save({**state, "epochs_run": epoch + 1}, partial)
        partial.replace(self.snapshot)

    def train(self, max_epochs):
        for epoch in range(self.epochs_run, max_epochs):
            self.run_epoch(epoch)
            if self.rank == 0 and (epoch + 1) % self.save_every == 0:
                self.save(epoch)


def main(total_epochs, save_every, batch_size, snapshot):
    dist.init_process_group("gloo")
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    loader = DataLoader(data, batch_size=batch_size, shuffle=False, sampler=DistributedSampler(data))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    Trainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), save_every, snapshot).train(total_epochs)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="a simple distributed training job")
    parser.add_argument("total_epochs", type=int)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--snapshot", default="snapshot.pt")
    arguments = parser.parse_args()
    main(arguments.total_epochs, arguments.save_every, arguments.batch_size, arguments.snapshot)
