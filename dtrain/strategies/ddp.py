"""Data parallelism: every worker holds the whole model, gradients are averaged (torch DistributedDataParallel)."""

import inspect
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from dtrain.settings import Settings

if TYPE_CHECKING:
    import torch

    from dtrain.models import ModelSize, Task
    from dtrain.plan import Plan, Workers
    from dtrain.spec.job import JobSpec
    from dtrain.strategies import MakeOptimizer, Prepared


class Options(Settings):
    """Every worker holds the whole model; gradients are averaged while the backward pass runs."""

    bucket_mib: Annotated[float, Meta(gt=0, le=4096.0)] = 25.0
    """Gradients are sent in buckets of this many MiB."""
    static_graph: bool = False
    """Promise that every step uses the same parameters, which saves bookkeeping."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Send gradients as they are, or in bf16: half the traffic, 8 bits of precision instead of 24."""


def check(options: Options, job: "JobSpec", workers: "Workers", size: "ModelSize") -> None:
    """DDP does everything a job can ask for."""


def prepare(task: "Task", plan: "Plan", device: "torch.device", make_optimizer: "MakeOptimizer") -> "Prepared":
    """Wrap each part in DDP; a single worker needs no wrapper."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from dtrain.strategies import Prepared
    from dtrain.strategies.engine import OptimizerEngine, in_bf16, restructure, training_state

    restructure(task, plan)
    options: Options = plan.strategy  # type: ignore[assignment]
    bare = {name: part.to(device) for name, part in task.parts.items()}
    wrapped = dict(bare)
    if dist.is_initialized() and dist.get_world_size() > 1:
        wrapped = {
            name: DistributedDataParallel(
                part,
                device_ids=[device] if device.type == "cuda" else None,
                bucket_cap_mb=options.bucket_mib,
                gradient_as_bucket_view=True,
                static_graph=options.static_graph,
                # Statistics of batches are synchronised where they are made.
                **{_buffers_in_forward(DistributedDataParallel): False},
            )
            for name, part in bare.items()
        }
        if options.gradient_compression == "bf16":
            for part in wrapped.values():
                part.register_comm_hook(None, in_bf16)
    engines: dict[str, OptimizerEngine] = {
        phase.name: OptimizerEngine(task, phase, bare, wrapped, plan, make_optimizer) for phase in task.phases
    }
    scales = [engine.scale.piece(name, is_primary=True) for name, engine in engines.items() if engine.scale]
    return Prepared(
        evaluation_parts=bare,
        engines=engines,
        state=[*training_state(bare, {name: engine.optimizer for name, engine in engines.items()}), *scales],
        is_replicated=True,
    )


def _buffers_in_forward(wrapper: type) -> str:
    """What DDP calls it that buffers are sent before each forward pass: newer ones warn about the older name."""
    known = inspect.signature(wrapper).parameters
    return "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
