"""Ranks for the doctor with one thing wrong in each."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain.doctor import exercise


def _replace(name, function):
    """Change what rank 1 of two calls `dist.<name>`; the worker that trains alone is left as it is."""
    original = getattr(dist, name)

    def replaced(*args, **words):
        return function(original, *args, **words) if dist.get_rank() == 1 else original(*args, **words)

    setattr(dist, name, replaced)


def hangs(args, descriptors):
    _replace("all_gather_into_tensor", lambda *_: time.sleep(600))
    return exercise.main(args, descriptors)


def is_killed(args, descriptors):
    _replace("broadcast", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    return exercise.main(args, descriptors)


def raises(args, descriptors):
    def fail(*_):
        raise ValueError("no such wire")

    _replace("all_to_all_single", fail)
    return exercise.main(args, descriptors)


def sends_wrong_numbers(args, descriptors):
    def nudge(original, data, *rest):
        original(data, *rest)
        data[17] += 1

    _replace("all_reduce", nudge)
    return exercise.main(args, descriptors)


def does_not_wait(args, descriptors):
    dist.barrier = lambda **_: None
    return exercise.main(args, descriptors)


def keeps_gradients_to_itself(args, descriptors):
    def begin(self, is_last):
        for module in self._synchronised:
            assert isinstance(module, DistributedDataParallel)
            module.require_backward_grad_sync = False

    exercise.component.load("strategies", "ddp")
    from dtrain.strategies.engine import OptimizerEngine

    OptimizerEngine.begin = begin
    return exercise.main(args, descriptors)


def does_not_train(args, descriptors):
    torch.optim.SGD.step = lambda self, closure=None: None
    return exercise.main(args, descriptors)


def cannot_start(args, descriptors):
    raise ImportError("libgloo.so: no such file")
