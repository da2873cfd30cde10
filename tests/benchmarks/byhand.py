"""The same training by hand: the same network, data, order, fused optimizer and clipping, and nothing around it.

One class a strategy, each written as that library's own documentation writes its smallest loop, and tuned alike.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import component
from dtrain.data import cache
from dtrain.data.order import Order


class Plain:
    """What all of them share: data, order, and a network in DDP."""

    def __init__(self, plan: Any, worker: int, num_workers: int) -> None:
        self._plan = plan
        data: Any = component.load("data", plan.data.name)
        model: Any = component.load("models", plan.model.name)
        self.task = model.build(plan.model, data.describe(plan.data), plan.train)
        self.network: nn.Module = self.task.parts["model"]
        self._max_norm = plan.train.clip_grad_norm
        self._every = plan.train.log_every_steps
        self._data = data.open(plan.data, cache.folder()).train
        self._log = open(os.devnull, "w", buffering=1)  # noqa: SIM115 - as long as the process
        batch = plan.batch
        assert batch.accumulation == 1
        # All that could be known beforehand is known: the order costs this loop nothing.
        order = Order(
            seed=plan.train.seed,
            num_samples=self._data.num_samples,
            global_size=batch.global_size,
            micro=batch.micro,
            accumulation=1,
            num_workers=num_workers,
            worker=worker,
        )
        self._order = [order.micro_batch(step, 0) for step in range(plan.train.steps)]
        self.done = 0
        self.prepare()

    def prepare(self) -> None:
        self.model = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        self.optimizer = self.fused(self.network.parameters())

    def fused(self, parameters: Any) -> torch.optim.Optimizer:
        self.parameters = list(parameters)
        o = self._plan.optimizer
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """By name, laid out as dtrain's state is; None where they are not."""
        return dict(self.network.state_dict())

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            arrays = self._data.batch(*self._order[self.done])
            inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
            loss = self.model(inputs, targets) / targets.numel()
            self.update(loss)
            self.done += 1
            if self.done % self._every == 0:
                self._log.write(f"{self.done} {loss.item()}\n")

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Sharded(Plain):
    """torch FSDP2."""

    def prepare(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in self.task.blocks():
            fully_shard(block)
        self.model = fully_shard(self.network)
        self.optimizer = self.fused(self.network.parameters())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.to_local() for name, tensor in self.network.state_dict().items()}


class Zero(Plain):
    """DeepSpeed, with torch's fused AdamW as its optimizer."""

    def prepare(self) -> None:
        import deepspeed

        self.network.train()
        batch = self._plan.batch
        config = {
            "train_batch_size": batch.global_size,
            "train_micro_batch_size_per_gpu": batch.micro,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._max_norm,
            "bf16": {"enabled": self._plan.train.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": self._plan.strategy.stage,
                "reduce_bucket_size": 2**25,
                "allgather_bucket_size": 2**25,
                "stage3_prefetch_bucket_size": 2**25,
                "stage3_param_persistence_threshold": self._plan.strategy.keep_below,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = self.fused(self.network.parameters())
        self.model, *_ = deepspeed.initialize(model=self.network, optimizer=optimizer, config=config)

    def weights(self) -> None:
        return None

    def update(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)
        self.model.step()


class Accelerated(Plain):
    """Hugging Face Accelerate."""

    def prepare(self) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=True)
        assert self._accelerator.num_processes > 1
        self.model, self.optimizer = self._accelerator.prepare(self.network, self.fused(self.network.parameters()))

    def update(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self.parameters, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


RIVALS = {"ddp": Plain, "fsdp": Sharded, "deepspeed": Zero, "accelerate": Accelerated}


def rival(plan: Any, worker: int, num_workers: int) -> Plain:
    """The hand-written loop that does what the plan's strategy does."""
    return RIVALS[plan.strategy.name](plan, worker, num_workers)
