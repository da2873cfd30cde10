"""Keepers that measure from within the loop: real ones, which at the edges of blocks of steps take the time."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import component
from dtrain.data import cache
from dtrain.data.order import step_indices
from dtrain.runtime.rank import Keeper


class HandWritten:
    """The same training by hand: the same network, data, order, fused optimizer and clipping, and nothing around it."""

    def __init__(self, plan: Any, worker: int, num_workers: int) -> None:
        data: Any = component.load("data", plan.data.name)
        model: Any = component.load("models", plan.model.name)
        self.network = model.build(plan.model, data.describe(plan.data), plan.train).parts["model"]
        self.model = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        self.parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": plan.optimizer.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        o = plan.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
        self._max_norm = plan.train.clip_grad_norm
        self._every = plan.train.log_every_steps
        self._data = data.open(plan.data, cache.folder()).train
        self._log = open(os.devnull, "w", buffering=1)  # noqa: SIM115 - as long as the process
        batch = plan.batch
        assert batch.accumulation == 1
        # All that could be known beforehand is known: the order costs this loop nothing.
        self._order = [
            step_indices(
                step,
                seed=plan.train.seed,
                num_samples=self._data.num_samples,
                global_size=batch.global_size,
                micro=batch.micro,
                accumulation=1,
                num_workers=num_workers,
                worker=worker,
            )[0]
            for step in range(plan.train.steps)
        ]
        self._done = 0

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            arrays = self._data.batch(self._order[self._done])
            inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
            loss = self.model(inputs, targets) / targets.numel()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self._max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._done += 1
            if self._done % self._every == 0:
                self._log.write(f"{self._done} {loss.item()}\n")


class StepKeeper(Keeper):
    """Between blocks of dtrain's steps the hand-written loop takes as many of its own."""

    BLOCK_S = 0.4
    """About how long a block is, rounded to whole intervals of metrics and snapshots."""
    WARM_STEPS = 20

    def attach(self, snapshot: Any, state: Mapping[str, torch.Tensor], completed: int) -> None:
        super().attach(snapshot, state, completed)
        self._state = state
        self._rival = HandWritten(self._plan, self._place.worker, self._place.num_workers)
        self._block = 0
        self._left = self.WARM_STEPS
        self._since: float | None = None
        self._times: dict[str, list[float]] = {"ours": [], "theirs": []}

    def begin_step(self, step: int) -> None:
        if self._left == 0:
            self._turn()
        self._left -= 1
        super().begin_step(step)

    def _turn(self) -> None:
        if self._block == 0:
            self._rival.run(self.WARM_STEPS)
            started = time.perf_counter()
            self._rival.run(self.WARM_STEPS)
            intervals = torch.tensor([self.BLOCK_S / (time.perf_counter() - started) * self.WARM_STEPS / 10])
            dist.broadcast(intervals, 0)
            self._block = max(1, round(intervals.item())) * 10
            self._left = self.WARM_STEPS  # until this loop has come as far
            return
        if self._since is not None:
            self._times["ours"].append((time.perf_counter() - self._since) / self._block)
            dist.barrier()
            started = time.perf_counter()
            self._rival.run(self._block)
            self._times["theirs"].append((time.perf_counter() - started) / self._block)
        self._left = self._block
        dist.barrier()
        self._since = time.perf_counter()

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None:
        if step == self._plan.train.steps:
            # Both have trained alike: after as many steps the weights must be the same, to the last bit.
            self._rival.run(step - self._rival._done)
            live = [tensor for name, tensor in self._state.items() if name.startswith("model.")]
            is_equal = all(map(torch.equal, live, self._rival.network.state_dict().values()))
            _write(self, {**self._times, "is_equal": is_equal})
        super().commit(step, held_out)


def _write(keeper: Keeper, measured: dict[str, Any]) -> None:
    """Where `inside.run` looks for it: the run folder, which the channel's log lies in."""
    if keeper._place.worker == 0:
        folder = os.path.dirname(os.path.dirname(os.readlink("/proc/self/fd/1")))
        with open(os.path.join(folder, "measured.json"), "w") as file:
            json.dump(measured, file)
