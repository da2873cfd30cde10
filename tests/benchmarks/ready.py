"""Rivals on one device, written by hand: all that they read lies on the device, and nothing is around the arithmetic.

They train dtrain's own networks, in the same precision and compiled alike, in dtrain's order of samples.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain import component
from dtrain.data import cache
from dtrain.data.order import Order
from dtrain.training.optim import learning_rate
from tests.benchmarks import byhand


class Ready(byhand.Plain):
    """What all of them share; alone it predicts tokens with one network that nothing is wrapped around."""

    def __init__(self, plan: Any, device: torch.device) -> None:
        data: Any = component.load("data", plan.data.name)
        model: Any = component.load("models", plan.model.name)
        self._plan, self._device, batch = plan, device, plan.batch
        self.task = model.build(plan.model, data.describe(plan.data), plan.train)
        for part in self.task.parts.values():
            part.to(device)
        if plan.train.compile:
            for block in self.task.blocks():
                block.compile()
        self._max_norm, self._every = plan.train.clip_grad_norm, plan.train.log_every_steps
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=plan.train.precision == "bf16")
        train = data.open(plan.data, cache.folder()).train
        arrays = train.batch(np.arange(train.num_samples), np.zeros(train.num_samples, dtype=np.uint64))
        self._pool = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        num, accumulation = train.num_samples, batch.accumulation
        order = Order(plan.train.seed, num, batch.global_size, batch.micro, accumulation, num_workers=1, worker=0)

        def indices(step: int, number: int) -> torch.Tensor:
            return torch.from_numpy(order.micro_batch(step, number)[0].copy()).to(device)

        self._indices = [[indices(step, number) for number in range(accumulation)] for step in range(plan.train.steps)]
        schedule, o = plan.schedule, plan.optimizer
        self._rates = [learning_rate(schedule, o.lr, step, plan.train.steps) for step in range(plan.train.steps)]
        self._rate = o.lr
        self._sum = torch.zeros((), device=device)
        self.done = 0
        self.last_loss = float("nan")
        """Mean over the steps between the last two lines of a log, as dtrain's metrics have it."""
        self.prepare()

    def prepare(self) -> None:
        self.model = self.network = self.task.parts["model"]
        self.optimizer = self.fused(self.network.parameters())

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def run(self, num_steps: int) -> None:
        """Take `num_steps` steps, and wait until the device has."""
        for _ in range(num_steps):
            if self._rates[self.done] != self._rate:
                self._rate = self._rates[self.done]
                for optimizer in self.optimizers():
                    for group in optimizer.param_groups:
                        group["lr"] = self._rate
            self.step([{name: of[index] for name, of in self._pool.items()} for index in self._indices[self.done]])
            self.done += 1
            if self.done % self._every == 0:
                self.last_loss = self._sum.item() / self._every
                self._sum.zero_()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, batches: list[dict[str, torch.Tensor]]) -> None:
        for number, batch in enumerate(batches, start=1):
            with self._autocast:
                loss = self.loss(batch) / len(batches)
            if number < len(batches):
                loss.backward()
            else:
                self.update(loss)
            self._sum += loss.detach()

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch["inputs"], batch["targets"]) / batch["targets"].numel()
        return loss

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def trying_all_algorithms() -> Iterator[None]:
    """In here cuDNN tries all its algorithms for each convolution once, and takes the quickest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Pictures(Ready):
    """Tells pictures apart, its weights held as convolutions want them; tries all algorithms of each convolution."""

    def prepare(self) -> None:
        self.model = self.network = self.task.parts["model"].to(memory_format=torch.channels_last)
        self._pool["images"] = self._pool["images"].to(memory_format=torch.channels_last)
        self.parameters, o = list(self.network.parameters()), self._plan.optimizer
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, fused=True)

    def run(self, num_steps: int) -> None:
        with trying_all_algorithms():
            super().run(num_steps)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = self.model(batch["images"]).float()
        return F.cross_entropy(scores, batch["labels"], label_smoothing=self._plan.model.label_smoothing)


class Adversaries(Ready):
    """DCGAN: the discriminator's update, then the generator's, with noise of the device's own."""

    def prepare(self) -> None:
        self.generator, self.discriminator = self.task.parts["generator"], self.task.parts["discriminator"]
        self.of_generator = self.fused(self.generator.parameters())
        self.of_discriminator = self.fused(self.discriminator.parameters())
        assert self._max_norm is None and self._plan.batch.accumulation == 1
        assert self._plan.model.discriminator_lr_share == 1.0

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.of_discriminator, self.of_generator]

    def run(self, num_steps: int) -> None:
        with trying_all_algorithms():
            super().run(num_steps)

    def step(self, batches: list[dict[str, torch.Tensor]]) -> None:
        from dtrain.models.networks import gan

        (batch,) = batches
        images, options = batch["images"], self._plan.model
        size = (len(images), options.latent_size)
        with self._autocast:
            with torch.no_grad():
                made = self.generator(torch.randn(size, device=self._device))
            real, fake = self.discriminator(images, made.to(images.dtype))
            judging = gan.discriminator_nats(real, fake, options.loss).mean()
        judging.backward()
        self.of_discriminator.step()
        self.of_discriminator.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)
        with self._autocast:
            (fake,) = self.discriminator(self.generator(torch.randn(size, device=self._device)))
            making = gan.generator_nats(fake, options.loss).mean()
        making.backward()
        self.discriminator.requires_grad_(True)
        self.of_generator.step()
        self.of_generator.zero_grad(set_to_none=True)
        self._sum += judging.detach() + making.detach()


class Sharded(byhand.Sharded, Ready):
    """torch FSDP2, on a group of one; computes under autocast, as dtrain does."""

    def prepare(self) -> None:
        self.network = self.task.parts["model"]
        super().prepare()


class Zero(byhand.Zero, Ready):
    """DeepSpeed with its own bf16."""

    def prepare(self) -> None:
        self.network = self.task.parts["model"]
        super().prepare()


class Accelerated(byhand.Accelerated, Ready):
    """Hugging Face Accelerate; under autocast rather than its `mixed_precision`, which is the same."""

    def prepare(self) -> None:
        from accelerate import Accelerator

        self.network = self.task.parts["model"]
        self._accelerator = Accelerator(cpu=self._device.type == "cpu")
        self.model, self.optimizer = self._accelerator.prepare(self.network, self.fused(self.network.parameters()))


MODELS = {"transformer": Ready, "cnn": Pictures, "gan": Adversaries}
STRATEGIES = {"fsdp": Sharded, "deepspeed": Zero, "accelerate": Accelerated}


def rival(plan: Any, device: torch.device) -> Ready:
    """The hand-written loop that does what the plan asks for, on one device."""
    assert plan.workers.total == 1
    return STRATEGIES.get(plan.strategy.name, MODELS[plan.model.name])(plan, device)
