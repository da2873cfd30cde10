"""Tasks with something out of the ordinary, and what ranks do with sharded state beside training."""

from pathlib import Path

import torch
from torch import nn
from world import Keeper, Plan, copies, make_training

from dtrain.checkpoint import store
from dtrain.checkpoint.snapshot import Snapshot, segments
from dtrain.models import Phase, Task
from dtrain.training import loop

# -- tasks -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Sizes that no number of workers divides."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Sequential(nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))
        self.offset = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features):
        self.calls += 1
        return self.second(torch.relu(self.first(features)))[:, 0] + self.offset


class Regression(Task):
    def loss(self, phase, parts, batch):
        return (parts["model"](batch["features"]) - batch["targets"]).square().mean()


def regression(shape, train):
    torch.manual_seed(train.seed)
    return Regression({"model": Net()})


def frozen(shape, train):
    """A first layer that is not trained."""
    task = regression(shape, train)
    task.parts["model"].first.requires_grad_(False)
    return task


def unused(shape, train):
    """A layer that the loss does not depend on."""
    task = regression(shape, train)
    task.parts["model"].spare = nn.Linear(2, 2)
    return task


def scalar(shape, train):
    """A parameter without any dimension."""
    task = regression(shape, train)
    task.parts["model"].offset = nn.Parameter(torch.tensor(0.0))
    return task


class Players(Task):
    """Two parts that play against each other, the second called in both phases."""

    def __init__(self, parts):
        super().__init__(parts, [Phase("judge", ("judge",)), Phase("maker", ("maker",))])

    def loss(self, phase, parts, batch):
        features = batch["features"]
        if phase == "maker":
            return -parts["judge"](parts["maker"](features)).mean()
        with torch.no_grad():
            made = parts["maker"](features)
        # Twice in one pass, and with inputs that need no gradient.
        return (parts["judge"](made) - parts["judge"](features)).mean() + parts["judge"](features).square().mean()

    def evaluate(self, parts, batch):
        made = parts["judge"](parts["maker"](batch["features"]))
        return {"loss": made.square().sum(), "samples": torch.tensor(float(len(made)))}

    def blocks(self):
        return [part[0] for part in self.parts.values()]


def players(shape, train):
    torch.manual_seed(train.seed)

    def part(num_outputs):
        return nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, num_outputs))

    return Players({"maker": part(5), "judge": part(1)})


class Overflowing(Regression):
    """In the first step, the gradients of the second worker alone are infinite."""

    def __init__(self, parts):
        super().__init__(parts)
        self._num_calls = 0

    def loss(self, phase, parts, batch):
        self._num_calls += 1
        loss = 1e-3 * super().loss(phase, parts, batch)  # so that nothing else overflows
        is_second = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        if is_second and self._num_calls == 1:
            return loss + 1e38 * (loss - loss.detach())
        return loss


def overflowing(shape, train):
    torch.manual_seed(train.seed)
    return Overflowing({"model": Net()})


# -- ranks -------------------------------------------------------------------------------------------------------


class _Leaves(Keeper):
    def __init__(self, last_step):
        super().__init__()
        self._last_step = last_step

    def end_step(self, step):
        return step == self._last_step


def train_and_write(rank, num_workers, plan_json, shape, task, steps, folder):
    """Train some steps; every rank copies its state into a segment, and the first writes them all to a checkpoint."""
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    loop.train(training, 0, _Leaves(steps))
    state, path = training.prepared.state, Path(folder) / "snapshot"
    is_replicated = training.prepared.is_replicated
    segment = path if is_replicated else path.with_name(f"snapshot-{rank}")
    snapshot = Snapshot.create(segment, state, num_workers if is_replicated else 1)
    slot = rank if is_replicated else 0
    snapshot.write_share(slot, steps, snapshot.share(slot, state))
    if num_workers > 1:
        torch.distributed.barrier()
    if rank == 0:
        pieces = [piece for held in segments(path, num_workers) for piece in held.pieces()]
        store.write(Path(folder), steps, pieces, {"metrics": None})
    return copies(state)


def read_and_train(rank, num_workers, plan_json, shape, task, steps, folder):
    """Load the checkpoint of `steps` and train to the end."""
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    store.read_into(store.path_of(Path(folder), steps), training.prepared.state)
    training.prepared.refresh()
    restored = copies(training.prepared.state)
    outcome = loop.train(training, steps, Keeper())
    return restored, copies(training.prepared.state), outcome


def gradients_of_idle_parts(rank, num_workers, plan_json, shape, task):
    """Which parameters have a gradient after the backward pass of each phase, in the second step."""
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    batch = {"features": torch.randn(4, 5), "targets": torch.randn(4)}
    found = {}
    for _ in range(2):
        for phase, engine in training.prepared.engines.items():
            engine.begin(True)
            engine.backward(training.task.loss(phase, engine.parts, batch))
            parts = training.task.parts.items()
            found[phase] = {f"{n}.{k}" for n, p in parts for k, q in p.named_parameters() if q.grad is not None}
            engine.step(0.1)
    return found
