"""Accelerate (Hugging Face) as the engine: its DDP, its FSDP2 or its DeepSpeed, each from explicit plugins."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from dtrain.errors import InputError
from dtrain.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain import footprint
    from dtrain.models import ModelSize, Task
    from dtrain.plan import Plan, Workers
    from dtrain.spec.job import JobSpec
    from dtrain.strategies import MakeOptimizer, Prepared
    from dtrain.strategies.deepspeed import Options as DeepSpeedOptions


class Options(Settings):
    """Hugging Face Accelerate wraps the model and updates it, by one of its engines."""

    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """What Accelerate spreads the model with."""
    bucket_mib: Annotated[float, Meta(gt=0, le=4096.0)] = 25.0
    """Gradients are sent in buckets of this many MiB (engine `ddp`)."""
    reshard_after_forward: bool = True
    """Give the gathered weights of a block up after its forward pass and gather them anew (engine `fsdp`)."""
    stage: Literal[1, 2, 3] = 2
    """What is divided: 1 the optimizer's state, 2 gradients as well, 3 weights as well (engine `deepspeed`)."""


def check(options: Options, job: "JobSpec", workers: "Workers", size: "ModelSize") -> None:
    """Raises `InputError` for what Accelerate cannot do inside of dtrain."""
    del workers
    if job.train.precision not in ("auto", "fp32", "bf16"):
        raise InputError(
            f"train.precision {job.train.precision}: strategy accelerate keeps the scale of its losses to itself, and a"
            " run that is resumed would lose it; use bf16, or strategy: {name: ddp}"
        )
    _check_parts(options, size.parts)


def _check_parts(options: Options, parts: Sequence[str]) -> None:
    """Accelerate divides one network (`Accelerator.prepare` says so); DDP takes any number."""
    if len(parts) > 1 and options.engine != "ddp":
        same = "fsdp" if options.engine == "fsdp" else f"deepspeed, stage: {options.stage}"
        raise InputError(
            f"strategy accelerate (engine {options.engine}) takes one network, and this model has {len(parts)}"
            f" ({', '.join(parts)}); use strategy: {{name: {same}}}"
        )


def bytes_per_number(options: Options, job: "JobSpec", workers: "Workers", accumulation: int) -> "footprint.Bytes":
    """As the strategy of the same name, where the model is sharded."""
    from dtrain import footprint
    from dtrain.strategies import deepspeed, fsdp

    if options.engine == "deepspeed":
        return deepspeed.bytes_per_number(_deepspeed_options(options), job, workers, accumulation)
    if options.engine == "fsdp":
        return fsdp.bytes_per_number(fsdp.Options(), job, workers, accumulation)
    return footprint.replicated(job)


def prepare(task: "Task", plan: "Plan", device: "torch.device", make_optimizer: "MakeOptimizer") -> "Prepared":
    """Let Accelerate wrap the parts of each phase, and make sure that it did what it was asked for."""
    import torch.distributed as dist

    options: Options = plan.strategy  # type: ignore[assignment]
    _check_parts(options, list(task.parts))  # of a task of the user's own, nobody knew
    if not dist.is_initialized():  # a worker alone
        dist.init_process_group(plan.workers.collectives, store=dist.HashStore(), rank=0, world_size=1)
    if options.engine == "deepspeed":
        return _deepspeed(task, plan, options, device, make_optimizer)
    return _torch(task, plan, options, device, make_optimizer)


def _torch(
    task: "Task", plan: "Plan", options: Options, device: "torch.device", make_optimizer: "MakeOptimizer"
) -> "Prepared":
    """DDP and FSDP2."""
    import torch

    from dtrain.strategies import Prepared
    from dtrain.strategies.accelerate_engine import AccelerateEngine, reshard, sharded_state
    from dtrain.strategies.engine import restructure, trained_parameters, training_state
    from dtrain.strategies.zero_engine import Called, Root

    restructure(task, plan)
    is_sharded = options.engine == "fsdp"
    trained_parts = {name for phase in task.phases for name in phase.parts}
    for name, part in task.parts.items():
        if name not in trained_parts or not is_sharded:
            part.to(device)
        else:
            for parameter in part.parameters():
                parameter.data = parameter.data.contiguous()  # FSDP2 takes no other memory format
    with _environment(device), warnings.catch_warnings():
        # What is to take its place cannot yet leave buffers alone when the first worker's are not to be sent.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        accelerator = _accelerator(task, options, device)
        wrapped = {}
        for phase in task.phases:
            root = Root({name: task.parts[name] for name in phase.parts})
            optimizer = make_optimizer(
                (n, p, task.learning_rate_share(phase, n)) for n, p in trained_parameters(task, phase)
            )
            if is_sharded and isinstance(optimizer, torch.optim.SGD):
                for group in optimizer.param_groups:
                    group["fused"] = False  # which torch's DTensor, that Accelerate leaves to it, does not know of SGD
            wrapped[phase.name] = (root, *accelerator.prepare(root, optimizer))
    parts = dict(task.parts)
    for root, model, _ in wrapped.values():
        parts |= {name: Called(root, name, model) for name in root.parts}
    # DDP is for what is trained: others are called as they are, and gradients flow through them all the same.
    engines = {
        phase.name: AccelerateEngine(
            accelerator,
            task,
            phase,
            parts if is_sharded else {n: parts[n] if n in phase.parts else task.parts[n] for n in parts},
            model=wrapped[phase.name][1],
            optimizer=wrapped[phase.name][2],
            max_norm=plan.train.clip_grad_norm,
        )
        for phase in task.phases
    }
    optimizers = {name: optimizer.optimizer for name, (_, _, optimizer) in wrapped.items()}
    if not is_sharded:
        return Prepared(task.parts, engines, training_state(task.parts, optimizers), is_replicated=True)
    roots = [model for _, model, _ in wrapped.values()]
    return Prepared(parts, engines, sharded_state(task, optimizers), is_replicated=False, refresh=reshard(roots))


def _deepspeed(
    task: "Task", plan: "Plan", options: Options, device: "torch.device", make_optimizer: "MakeOptimizer"
) -> "Prepared":
    """ZeRO: wrapped by Accelerate, stepped by `ZeroEngine`.

    Accelerate would step inside of the last backward pass, before the loop has said with what learning rate.
    """
    from dtrain.strategies import deepspeed

    def wrap(root: "nn.Module", optimizer: Any, settings: dict[str, Any]) -> Any:
        from accelerate import Accelerator, DistributedType, PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import DeepSpeedPlugin

        with _environment(device):
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState(cpu=device.type == "cpu")  # it takes ZeRO on a CPU for DDP unless this is said apart
            accelerator = Accelerator(
                deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
                gradient_accumulation_steps=plan.batch.accumulation,
            )
            _insist(accelerator, DistributedType.DEEPSPEED, device)
            return accelerator.prepare(root, optimizer)[0]

    return deepspeed.divide(task, plan, _deepspeed_options(options), device, make_optimizer, wrap)


def _deepspeed_options(options: Options) -> "DeepSpeedOptions":
    from dtrain.strategies import deepspeed

    return deepspeed.Options(stage=options.stage)


def _accelerator(task: "Task", options: Options, device: "torch.device") -> Any:
    """An `Accelerator` for DDP or FSDP2."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = device.type == "cpu"
    if options.engine == "ddp":
        ddp = DistributedDataParallelKwargs(
            bucket_cap_mb=options.bucket_mib, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[ddp])
        _insist(accelerator, DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU, device)
        return accelerator
    state = PartialState(cpu=on_cpu)
    if on_cpu:
        # Accelerate shards on accelerators only, and on CPUs falls back on DDP without a word.
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    kinds = sorted({type(block).__name__ for block in task.blocks()})
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=options.reshard_after_forward,
        auto_wrap_policy="transformer_based_wrap" if kinds else "no_wrap",
        transformer_cls_names_to_wrap=kinds or None,
        cpu_offload=False,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
        activation_checkpointing=False,
    )
    accelerator = Accelerator(mixed_precision="no", fsdp_plugin=plugin)
    _insist(accelerator, DistributedType.FSDP, device)
    return accelerator


def _insist(accelerator: Any, expected: Any, device: "torch.device") -> None:
    """Accelerate falls back on something simpler without a word; then this is a bug, here or there."""
    import torch.distributed as dist

    found = (accelerator.distributed_type, accelerator.device.type, accelerator.num_processes)
    assert found == (expected, device.type, dist.get_world_size()), f"Accelerate made {found} of {expected}"


@contextlib.contextmanager
def _environment(device: "torch.device") -> Iterator[None]:
    """What Accelerate reads from the environment is there, and what it writes there is gone afterwards."""
    import torch
    import torch.distributed as dist

    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]:
        del os.environ[name]
    rank, num_workers = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank,
        "WORLD_SIZE": num_workers,
        "LOCAL_RANK": str(device.index or 0) if device.type == "cuda" else rank,
        "LOCAL_WORLD_SIZE": num_workers,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # it would set another number of threads
        "DS_ACCELERATOR": device.type,  # it imports DeepSpeed wherever that is installed, used or not
    }
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
