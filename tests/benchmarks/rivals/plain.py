"""What the rival scripts share: the same network on the same tokens, trained by hand, as fast as torch allows."""

import json
import os
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.models.networks.transformer import Transformer


class Trainer:
    """Model, fused optimizer and data of one rank; the process group exists."""

    def __init__(self, config: dict[str, Any], rank: int, world: int) -> None:
        torch.set_num_threads(1)
        options = SimpleNamespace(**config["model"], padded=lambda _: config["padded"])
        self.network = Transformer(options, config["vocabulary_size"], config["sequence_length"])
        self.network.initialise(config["seed"])
        self.model = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"], fused=True
        )
        self._max_norm = config["clip_grad_norm"]
        self._tokens = np.memmap(config["tokens"], dtype=np.uint16, mode="r")
        self._length, self._micro = config["sequence_length"], config["micro"]
        num_samples = (len(self._tokens) - 1) // self._length
        self._order = np.random.default_rng(config["seed"]).permutation(num_samples)[rank::world]

    def step(self, number: int) -> float:
        """One optimizer step; returns its loss."""
        first = number * self._micro
        indices = self._order.take(range(first, first + self._micro), mode="wrap")
        offsets = indices[:, None] * self._length + np.arange(self._length)
        inputs = torch.from_numpy(self._tokens[offsets].astype(np.int64))
        targets = torch.from_numpy(self._tokens[offsets + 1].astype(np.int64))
        loss = self.model(inputs, targets) / targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state(self, done: int) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "done": done}

    def restore(self, state: dict[str, Any]) -> int:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])


class Log:
    """One line a completed step."""

    def __init__(self, path: str, **facts: Any) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - as long as the process
        self._facts = facts

    def write(self, **facts: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "pid": os.getpid(), **self._facts, **facts}) + "\n")
