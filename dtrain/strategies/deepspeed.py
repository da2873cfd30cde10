"""ZeRO: optimizer state, gradients and weights are divided among workers (Rajbhandari et al., "ZeRO", 2020)."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
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


class Options(Settings):
    """ZeRO by DeepSpeed: optimizer state, gradients and weights are divided among the workers."""

    stage: Literal[1, 2, 3] = 2
    """What is divided: 1 the optimizer's state, 2 gradients as well, 3 weights as well, gathered layer by layer."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state and its update live: on the device, or in the node's memory, which is slower."""
    offload_parameters: bool = False
    """Keep the divided weights in the node's memory until a layer needs them (stage 3)."""
    reduce_bucket_mib: Annotated[float, Meta(gt=0, le=8192.0)] = 128.0
    """Gradients are sent in buckets of this many MiB; each worker holds one such bucket, two when they overlap."""
    gather_bucket_mib: Annotated[float, Meta(gt=0, le=8192.0)] = 128.0
    """New weights are gathered in buckets of this many MiB (stages 1 and 2), or fetched so far ahead (stage 3)."""
    keep_below: Annotated[int, Meta(ge=0, le=10**9)] = 100_000
    """Weights with at most this many numbers are never divided, which saves many small messages (stage 3)."""
    overlap_comm: bool = False
    """Send gradients while the backward pass still computes."""


def check(options: Options, job: "JobSpec", workers: "Workers", size: "ModelSize") -> None:
    """Raises `InputError` for what ZeRO cannot do here."""
    del workers, size  # it works with any number of either
    where = f"strategy deepspeed (stage {options.stage})"
    if job.train.precision not in ("auto", "fp32", "bf16"):
        raise InputError(
            f"train.precision {job.train.precision}: {where} computes in fp32 and bf16; use bf16, which needs no"
            " scaling of losses, or strategy: {name: fsdp}"
        )
    if options.offload_optimizer == "nvme":
        raise InputError(
            "strategy.offload_optimizer nvme: a run is kept alive from a copy of its state in memory, so a state too"
            " large for memory cannot be kept; use offload_optimizer: cpu, or divide it among more workers"
        )
    if options.offload_parameters and options.stage != 3:
        raise InputError(
            f"strategy.offload_parameters: only stage 3 divides weights, and this is stage {options.stage};"
            " use stage: 3"
        )


def bytes_per_number(options: Options, job: "JobSpec", workers: "Workers", accumulation: int) -> "footprint.Bytes":
    """The stages divide one thing after the other; a weight that is computed with in bf16 has an fp32 copy besides."""
    from dtrain import footprint

    del accumulation  # gradients wait where they are divided
    divided, has_host = 1.0 / workers.total, workers.device == "cuda"
    weight = 2.0 if job.train.precision == "bf16" else 4.0
    held = 0.0 if options.offload_parameters and has_host else weight * (divided if options.stage == 3 else 1.0)
    gradient = 4.0 * (divided if options.stage >= 2 else 1.0)
    updated = (4.0 + footprint.optimizer_bytes(job)) * divided
    if options.offload_optimizer != "none" and has_host:
        updated = 0.0
        gradient = gradient if options.stage == 1 else 0.0
    return footprint.Bytes(trained=held + gradient + updated, frozen=held, average=4.0 * divided)


def prepare(task: "Task", plan: "Plan", device: "torch.device", make_optimizer: "MakeOptimizer") -> "Prepared":
    """One DeepSpeed engine a phase, each dividing the parts that its phase trains."""

    def wrap(root: "nn.Module", optimizer: Any, settings: dict[str, Any]) -> Any:
        import deepspeed

        return deepspeed.initialize(model=root, optimizer=optimizer, config=settings)[0]

    options: Options = plan.strategy  # type: ignore[assignment]
    return divide(task, plan, options, device, make_optimizer, wrap)


def divide(
    task: "Task",
    plan: "Plan",
    options: Options,
    device: "torch.device",
    make_optimizer: "MakeOptimizer",
    wrap: Callable[["nn.Module", Any, dict[str, Any]], Any],
) -> "Prepared":
    """What `prepare` does, with `wrap` to make a DeepSpeed engine of a network, its optimizer and the settings."""
    import torch

    from dtrain.models.networks.batch_norm import synchronise
    from dtrain.strategies import Prepared, zero_state
    from dtrain.strategies.engine import restructure, trained_parameters
    from dtrain.strategies.zero_engine import Root, ZeroEngine, called

    owners = [name for phase in task.phases for name in phase.parts]
    twice = sorted({name for name in owners if owners.count(name) > 1})
    if twice:
        raise InputError(
            f"two phases train the part {twice[0]}: ZeRO divides a part for one phase only; use strategy: {{name: ddp}}"
        )
    scalars = [name for phase in task.phases for name, p in trained_parameters(task, phase) if p.ndim == 0]
    if scalars and options.stage == 3:
        raise InputError(
            f"{scalars[0]} is a single number, a parameter without dimensions, which stage 3 cannot divide; give it the"
            " shape [1], or use strategy: {name: deepspeed, stage: 2}"
        )
    restructure(task, plan)
    if plan.train.precision != "fp32":
        for part in task.parts.values():
            synchronise(part)  # also of one worker: torch's own batch norm does not take weights that are rounded
    for name, part in task.parts.items():
        if name not in owners:
            part.to(device)
    # DeepSpeed would take its fp32 weights from those it has already rounded.
    exact = (
        {}
        if plan.train.precision == "fp32"
        else {id(p): p.detach() for m in task.parts.values() for p in m.parameters()}
    )
    roots, wrapped, held, optimizers = [], {}, {}, {}
    settings = configuration(plan, options)
    for phase in task.phases:
        root = Root({name: task.parts[name] for name in phase.parts})
        trained = [(n, p, task.learning_rate_share(phase, n)) for n, p in trained_parameters(task, phase)]
        optimizer = make_optimizer(trained)
        group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        with _loaded(device), _sendable(root, device):
            engine = wrap(root, optimizer, settings)
        held[phase.name] = zero_state.runs(engine.optimizer)
        zero_state.initialise(optimizer, held[phase.name], group_of)
        roots.append(root)
        wrapped[phase.name], optimizers[phase.name] = engine, optimizer
    parts = called(roots, task.parts)
    engines = {phase.name: ZeroEngine(wrapped[phase.name], task, phase, parts) for phase in task.phases}

    def refresh() -> None:
        for made in wrapped.values():
            zero_state.publish(made.optimizer)

    if exact:
        for runs in held.values():
            zero_state.fill(runs, exact)  # networks compute with the rounded ones already
        # The loop's autocast is for losses; a sample would give numbers in fp32 to weights that are not.
        task.sample = torch.autocast(device.type, torch.bfloat16)(task.sample)  # type: ignore[method-assign]
    return Prepared(
        evaluation_parts=parts,
        engines=engines,
        state=zero_state.pieces(task.parts, held, optimizers),
        is_replicated=False,
        refresh=refresh,
    )


def configuration(plan: "Plan", options: Options) -> dict[str, Any]:
    """DeepSpeed's settings, all of them from the plan."""
    is_low = plan.train.precision != "fp32"
    numbers_per_mib = 2**20 // (2 if is_low else 4)
    reduce_bucket = max(1, round(options.reduce_bucket_mib * numbers_per_mib))
    gather_bucket = 2 * max(1, round(options.gather_bucket_mib * numbers_per_mib / 2))  # must be even
    zero: dict[str, Any] = {
        "stage": options.stage,
        "contiguous_gradients": True,
        "overlap_comm": options.overlap_comm,
        "reduce_scatter": True,
        "reduce_bucket_size": reduce_bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": gather_bucket,
    }
    on_gpu = plan.workers.device == "cuda"
    if options.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if options.stage == 3:
        zero["stage3_prefetch_bucket_size"] = gather_bucket
        zero["stage3_param_persistence_threshold"] = options.keep_below
        if options.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": plan.batch.global_size,
        "train_micro_batch_size_per_gpu": plan.batch.micro,
        "gradient_accumulation_steps": plan.batch.accumulation,
        "gradient_clipping": plan.train.clip_grad_norm or 0.0,
        "bf16": {"enabled": is_low},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own, updating flat runs as it would update matrices
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


@contextlib.contextmanager
def _loaded(device: "torch.device") -> Iterator[None]:
    """In here DeepSpeed can be used: with a process group, and silent where it only seems to have something to say."""
    import torch.distributed as dist

    # Stage 3 reads it in every step (0.19.8, runtime/zero/utils.py); a setting of nobody's, so it may stay.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = device.type  # while it is imported: it would take a GPU that this run leaves alone
    try:
        import deepspeed
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before
    from deepspeed.ops import __compatible_ops__ as operators
    from deepspeed.utils import logger

    # Compiling it takes minutes, and a compilation that is killed leaves a lock behind; gloo does the same work.
    operators["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # a worker alone
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    # For good, since they are called in every step: newer torch has the same functions under other names.
    warnings.filterwarnings(
        "ignore", "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)`", FutureWarning
    )
    logger.addFilter(_is_worth_reading)
    try:
        # It prints how much memory it uses, whatever the level of its log.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # DeepSpeed imports torch's compiler, which uses what torch itself calls deprecated.
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            yield
    finally:
        logger.removeFilter(_is_worth_reading)


@contextlib.contextmanager
def _sendable(root: "nn.Module", device: "torch.device") -> Iterator[None]:
    """In here DeepSpeed can send the first worker's parameters to all, whatever their shape and memory format."""
    import torch.distributed as dist

    scalars = []
    for parameter in root.parameters():
        parameter.data = parameter.data.contiguous()  # ZeRO would make it so anyway
        if parameter.ndim == 0:
            sent = parameter.detach().to(device)  # NCCL takes nothing that lies elsewhere
            dist.broadcast(sent, src=0)
            parameter.data.copy_(sent)
            parameter.ds_optim_param = True  # marks what it does not send
            scalars.append(parameter)
    yield
    for parameter in scalars:
        del parameter.ds_optim_param


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Not the warning of an optimizer that DeepSpeed's authors have not tried: dtrain's tests do."""
    return "untested optimizer" not in record.getMessage()
