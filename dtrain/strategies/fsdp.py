"""Sharded data parallelism: every worker holds a part of each weight and gathers the rest when it is computed with.

torch's `fully_shard` (FSDP2); with `tensor_parallel`, layers are split over neighbouring workers besides.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from dtrain.errors import InputError
from dtrain.settings import PositiveInt, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from dtrain import footprint
    from dtrain.models import ModelSize, Task
    from dtrain.plan import Plan, Workers
    from dtrain.spec.job import JobSpec
    from dtrain.strategies import MakeOptimizer, Prepared
    from dtrain.strategies.mesh import Mesh


class Options(Settings):
    """Weights, gradients and optimizer state are sharded over the workers (torch FSDP2)."""

    wrap: Literal["blocks", "size"] = "blocks"
    """What is gathered at a time: each of the model's repeated blocks, or each submodule of `min_parameters` or more;
    and then all the rest."""
    min_parameters: Annotated[PositiveInt, Meta(le=10**12)] = 1_000_000
    """Parameters that a submodule has at least to be gathered by itself, with `wrap: size`."""
    reshard_after_forward: bool = True
    """Give the gathered weights of a block up after its forward pass and gather them anew for the backward pass, which
    saves memory and costs traffic."""
    replicate: PositiveInt | Literal["nodes"] = 1
    """Copies of the model, each sharded over its share of the workers (hybrid sharding); `nodes`: one on each node."""
    tensor_parallel: Annotated[PositiveInt, Meta(le=1024)] = 1
    """Neighbouring workers that compute each layer together, each with a slice of its weights."""
    gather: Literal["fp32", "low"] = "fp32"
    """Format in which weights travel to be computed with: fp32, or for linear and convolution layers in blocks that of
    `train.precision`, in which they compute anyway."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Send gradients as they are, or in bf16: half the traffic, 8 bits of precision instead of 24."""
    reduce_each_micro_batch: bool = False
    """Exchange gradients after every micro batch instead of after the last: gradients of the whole model are then never
    in one worker's memory, and there is more traffic."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory, and update them there."""


def check(options: Options, job: "JobSpec", workers: "Workers", size: "ModelSize") -> None:
    """Raises `InputError` for layers or workers that do not come out even, and for settings that contradict others."""
    del size
    _check_tensor_parallel(options.tensor_parallel, job, workers)
    readers = workers.total // options.tensor_parallel
    copies = _copies(options, workers)
    if readers % copies:
        raise InputError(
            f"strategy.replicate {copies} does not divide the {_of(readers, options)} that shard the model;"
            f" nearest: {_nearest_divisor(readers, copies)}"
        )
    if copies == readers > 1:
        raise InputError(
            f"strategy.replicate {copies} leaves one worker to each copy, and nothing is sharded; use a smaller one,"
            " or strategy: {name: ddp}"
        )
    if options.gather == "low" and job.train.precision == "fp32":
        raise InputError("strategy.gather: low needs train.precision: bf16 or fp16; at fp32 there is nothing to lower")
    if options.gather == "low" and job.train.compile:
        raise InputError(
            "strategy.gather: low gathers layer by layer inside of blocks, which train.compile would have to break up;"
            " use gather: fp32, or train.compile: false"
        )


def sharing(options: Options) -> int:
    """Workers that compute each of their samples together."""
    return options.tensor_parallel


def bytes_per_number(options: Options, job: "JobSpec", workers: "Workers", accumulation: int) -> "footprint.Bytes":
    """Everything is divided by the workers that share a copy; gradients that wait for the last micro batch are not."""
    from dtrain import footprint

    if options.cpu_offload and workers.device == "cuda":
        return footprint.Bytes(trained=0.0, frozen=0.0, average=0.0)
    shards = max(workers.total // _copies(options, workers), 1)
    waiting = 4.0 if accumulation > 1 and not options.reduce_each_micro_batch else 0.0
    divided = footprint.replicated(job)
    return footprint.Bytes(
        trained=(divided.trained - waiting) / shards + waiting / options.tensor_parallel,
        frozen=divided.frozen / shards,
        average=divided.average / shards,
    )


def prepare(task: "Task", plan: "Plan", device: "torch.device", make_optimizer: "MakeOptimizer") -> "Prepared":
    """Shard each part in place; one worker alone is a group of one."""
    import contextlib
    import functools

    import torch
    import torch.distributed as dist

    from dtrain.strategies import Prepared
    from dtrain.strategies import sharded as sharding
    from dtrain.strategies.engine import restructure
    from dtrain.strategies.tensor_parallel import split

    options: Options = plan.strategy  # type: ignore[assignment]
    if not dist.is_initialized():
        dist.init_process_group(plan.workers.collectives, store=dist.HashStore(), rank=0, world_size=1)
    mesh, data_mesh, tensor_mesh = _meshes(options, plan, device)
    restructure(task, plan)
    shared = split(task, tensor_mesh) if tensor_mesh is not None else []
    _shard(task, options, plan, data_mesh)
    worker = dist.get_rank()
    shards = sharding.shards_of(task, mesh, worker)
    engines = {
        phase.name: sharding.ShardedEngine(
            task,
            phase,
            shards,
            plan,
            make_optimizer,
            device=device,
            is_reduced_last=not options.reduce_each_micro_batch,
            shared=shared,
            tensor_group=tensor_mesh.get_group() if tensor_mesh is not None else None,
        )
        for phase in task.phases
    }
    low = _low(options, plan)
    autocast = torch.autocast(device.type, low) if low is not None else contextlib.nullcontext()
    task.sample = sharding.with_gathered_roots(task, task.sample, autocast)  # type: ignore[method-assign,assignment]
    modules = list(sharding.sharded_modules(list(task.parts.values())))
    return Prepared(
        evaluation_parts=task.parts,
        engines=engines,
        state=sharding.state_of(task, shards, engines, is_first=worker == 0),
        is_replicated=False,
        refresh=functools.partial(sharding.reshard, modules),
    )


def _meshes(options: Options, plan: "Plan", device: "torch.device") -> "tuple[Mesh, DeviceMesh, DeviceMesh | None]":
    """The workers, those among whom weights are sharded, and those that compute a layer together."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from dtrain.strategies.mesh import Mesh

    mesh = Mesh.of(dist.get_world_size(), _copies(options, plan.workers), options.tensor_parallel)
    sizes = (mesh.replicas, mesh.shards, mesh.tensor)
    devices = init_device_mesh(device.type, sizes, mesh_dim_names=("replica", "shard", "tensor"))
    data = devices["replica", "shard"] if mesh.replicas > 1 else devices["shard"]
    return mesh, data, devices["tensor"] if mesh.tensor > 1 else None


def _shard(task: "Task", options: Options, plan: "Plan", mesh: "DeviceMesh") -> None:
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # Autocast stays on, as under any other strategy: what must be exact (norms, losses) is, and a layer that is
    # gathered in a low format is one that autocast would cast to it.
    reduced = torch.bfloat16 if options.gradient_compression == "bf16" else torch.float32
    for name, part in task.parts.items():
        for key, parameter in part.named_parameters():
            if parameter.ndim == 0:
                raise InputError(
                    f"strategy fsdp cuts parameters along their first dimension, and {name}.{key} has none; give it the"
                    " shape [1], or use strategy: {name: ddp}"
                )
    low = _low(options, plan)
    words: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=plan.workers.device == "cuda") if options.cpu_offload else OffloadPolicy()
        ),
    }
    lowered = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduced, cast_forward_inputs=False)
    for group in task.blocks() if options.wrap == "blocks" else _large(task, options.min_parameters):
        layers = [module for module in group.modules() if low is not None and _computes_low(module)]
        if layers:
            fully_shard(layers, **{**words, "mp_policy": lowered}, reshard_after_forward=options.reshard_after_forward)
        fully_shard(group, **words, reshard_after_forward=options.reshard_after_forward)
    for part in task.parts.values():
        fully_shard(part, **words)


def _low(options: Options, plan: "Plan") -> "torch.dtype | None":
    """The format that some weights are gathered in, where it is not fp32."""
    import torch

    formats = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return formats[plan.train.precision] if options.gather == "low" else None


def _large(task: "Task", min_parameters: int) -> "list[nn.Module]":
    """Submodules with `min_parameters` or more that no smaller one takes, the innermost first.

    Only those made of others: a layer's weight may be read without the layer being called.
    """
    from torch import nn

    found: list[nn.Module] = []

    def visit(module: nn.Module, is_part: bool) -> int:
        """Parameters of `module` that are not in a group of their own."""
        left = sum(p.numel() for p in module.parameters(recurse=False))
        children = list(module.children())
        left += sum(visit(child, False) for child in children)
        if is_part or not children or left < min_parameters or isinstance(module, nn.ModuleList | nn.ModuleDict):
            return left
        found.append(module)
        return 0

    for part in task.parts.values():
        visit(part, True)
    return found


def _computes_low(module: "nn.Module") -> bool:
    """Whether autocast casts the weights of exactly this kind of layer, and nobody reads them but the layer."""
    from torch import nn

    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _copies(options: Options, workers: "Workers") -> int:
    return workers.num_nodes if isinstance(options.replicate, str) else options.replicate


def _check_tensor_parallel(size: int, job: "JobSpec", workers: "Workers") -> None:
    if size == 1:
        return
    if workers.per_node % size:
        raise InputError(
            f"strategy.tensor_parallel {size} does not divide the {workers.per_node} workers of a node;"
            f" nearest: {_nearest_divisor(workers.per_node, size)}"
        )
    if job.model.name == "custom":
        return  # its own Task.tensor_parallel says, once it is built
    heads, hidden = getattr(job.model, "num_heads", None), getattr(job.model, "hidden", None)
    if heads is None or hidden is None:
        raise InputError(
            f"strategy.tensor_parallel: model {job.model.name} cannot be split inside of its layers; use"
            " tensor_parallel: 1, which shards its weights over all workers"
        )
    for what, count in (("num_heads", heads), ("the hidden width of an MLP", hidden)):
        if count % size:
            raise InputError(
                f"strategy.tensor_parallel {size} does not divide {what} {count} of model {job.model.name};"
                " choose one that does"
            )


def _nearest_divisor(number: int, to: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - to))


def _of(readers: int, options: Options) -> str:
    sharing = options.tensor_parallel
    return f"{readers} workers" if sharing == 1 else f"{readers} groups of {sharing} workers"
