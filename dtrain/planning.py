"""From a job and a cluster to a plan with nothing left open. Pure; needs neither torch nor ray."""

from pathlib import Path
from typing import Any, overload

from msgspec.structs import replace

from dtrain import code, component, footprint
from dtrain.errors import InputError
from dtrain.machine import Machine, probe
from dtrain.plan import Arithmetic, BatchArithmetic, Plan, ScriptPlan, Workers, storage_of
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.job import Batch, Checkpoint, Evaluate, JobSpec, Loading, Schedule, ScriptSpec, Train

ACTIVATION_SHARE = 0.25
"""Share of a worker's memory that activations of one micro batch may fill; the rest is for weights and others."""
MAX_MICRO_TOKENS_ON_CPU = 16_384
MAX_LOADERS = 4
"""Most processes that read ahead for a worker unless a job says otherwise."""


@overload
def make_plan(
    job: JobSpec, cluster: ClusterSpec, machine: Machine | None = None, folder: Path | None = None
) -> Plan: ...
@overload
def make_plan(
    job: ScriptSpec, cluster: ClusterSpec, machine: Machine | None = None, folder: Path | None = None
) -> ScriptPlan: ...


def make_plan(
    job: JobSpec | ScriptSpec, cluster: ClusterSpec, machine: Machine | None = None, folder: Path | None = None
) -> Plan | ScriptPlan:
    """Decide everything a run needs.

    What one node has is what the cluster file says, else `machine`, else what is found here. Relative paths in the
    job start at `folder`, its file's own; where the command is given when left out.
    Raises `InputError` for what cannot work, naming the key and the nearest value that does.
    """
    machine, folder = cluster.machine or machine or probe(), folder or Path.cwd()
    if isinstance(job, ScriptSpec):
        return _script_plan(job, cluster, machine, folder)
    notes: list[str] = []
    warnings: list[str] = []
    workers = _workers(job.batch, _sharing(job), cluster, machine, notes, warnings)
    _check_precision(job, cluster, workers)
    source, network = component.load("data", job.data.name), component.load("models", job.model.name)
    data, model = _resolved(source, job.data, folder), _resolved(network, job.model, folder)
    shape = source.describe(data)
    size = network.describe(model, shape)
    component.load("strategies", job.strategy.name).check(job.strategy, job, workers, size)
    memory = cluster.memory_per_worker_gib or _memory_per_worker(machine, workers)
    batch = _batch(job, workers, size.activation_bytes_per_sample, memory, shape.sequence_length, notes)
    warnings += footprint.check(job, workers, size, batch.accumulation, memory)
    return Plan(
        name=job.name,
        cluster=cluster.name,
        backend=cluster.backend,
        storage=storage_of(cluster.storage),
        code=_hashes([*_own_code(network, model), *_own_code(source, data)]),
        model=model,
        data=data,
        strategy=job.strategy,
        optimizer=job.optimizer,
        schedule=_schedule(job, notes),
        train=_train(job, workers, machine, shape.is_cheap, notes),
        evaluate=_evaluate(job, notes),
        checkpoint=_checkpoint(job, notes),
        retry=job.retry,
        workers=workers,
        batch=batch,
        arithmetic=Arithmetic(
            num_parameters=size.num_parameters,
            flops_per_step=size.flops_per_sample * batch.global_size,
            tokens_per_step=shape.sequence_length * batch.global_size,
        ),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _script_plan(job: ScriptSpec, cluster: ClusterSpec, machine: Machine, folder: Path) -> ScriptPlan:
    notes: list[str] = []
    warnings: list[str] = []
    workers = _workers(None, 1, cluster, machine, notes, warnings)
    script = code.absolute(job.entrypoint.script, folder)
    try:
        code.check_syntax(script)
    except InputError as error:
        raise InputError(f"entrypoint.script: {error.message}; relative paths start at the job file's folder") from None
    return ScriptPlan(
        name=job.name,
        cluster=cluster.name,
        backend=cluster.backend,
        storage=storage_of(cluster.storage),
        retry=job.retry,
        workers=workers,
        code=_hashes([script]),
        notes=tuple(notes),
        warnings=tuple(warnings),
        entrypoint=replace(job.entrypoint, script=str(script)),
        folder=str(Path.cwd()),
    )


def _resolved(module: Any, options: Any, folder: Path) -> Any:
    """Options with relative paths made absolute; a model that names none needs no `resolve`."""
    return module.resolve(options, folder) if hasattr(module, "resolve") else options


def _own_code(module: Any, options: Any) -> list[Path]:
    """Files of the user's own that a component runs; only the `custom` ones do."""
    return list(module.own_code(options)) if hasattr(module, "own_code") else []


def _hashes(files: list[Path]) -> dict[str, str]:
    return {str(file): code.sha256(file) for file in files}


def _workers(
    batch: Batch | None,
    sharing: int,
    cluster: ClusterSpec,
    machine: Machine,
    notes: list[str],
    warnings: list[str],
) -> Workers:
    has_gpus, described = bool(machine.gpus), cluster.machine is not None
    if cluster.device == "gpu" and not has_gpus and (described or cluster.workers_per_node == "auto"):
        lacking = "its machines have none; set device: cpu, or name another cluster with --cluster"
        if not described:
            lacking = "this machine has none; set device: cpu, or workers_per_node"
        raise InputError(f"cluster {cluster.name!r} asks for GPUs and {lacking}")
    on_gpu = cluster.device == "gpu" or (cluster.device == "auto" and has_gpus)
    if cluster.device == "auto":
        found = f"{len(machine.gpus)} x {machine.gpus[0].name}" if has_gpus else "no GPU"
        notes.append(f"device: {'GPUs' if on_gpu else 'CPUs'} (found {found}, {machine.num_cores} cores)")
    available = len(machine.gpus) if on_gpu else machine.num_cores
    per_node = cluster.workers_per_node
    if per_node == "auto":
        per_node = available
        if batch is not None:
            per_node = _largest_that_divides(batch, cluster.nodes, available, sharing)
        what = "GPUs" if on_gpu else "cores"
        reason = ""
        if batch is not None and per_node != available:
            reason = f", the most that divide batch.global {batch.global_size}"
        notes.append(f"workers_per_node: {per_node} ({available} {what}{reason})")
    elif per_node > available and on_gpu and has_gpus:
        raise InputError(
            f"workers_per_node {per_node} is more than the {available} GPUs of"
            f" {f'a machine of cluster {cluster.name!r}' if described else 'this machine'};"
            f" one worker needs one GPU: at most {available}"
        )
    elif per_node > available and not on_gpu:
        shared = f"{available} core{'' if available == 1 else 's'}"
        warnings.append(f"{per_node} workers share {shared}: correct, but slower than {_workers_word(available)}")
    # A run on some of the GPUs leaves the other GPUs' share of the cores to others.
    threads = max(1, machine.num_cores // (max(available, per_node) if on_gpu else per_node))
    return Workers(
        num_nodes=cluster.nodes,
        per_node=per_node,
        device="cuda" if on_gpu else "cpu",
        collectives="nccl" if on_gpu else "gloo",
        threads=threads,
        cpus_per_node=min(machine.num_cores, threads * per_node),
    )


def _largest_that_divides(batch: Batch, num_nodes: int, available: int, sharing: int) -> int:
    """Workers of a node, in whole groups that share samples, so many that the readers divide the batch; else 1."""
    groups = range(available // sharing, 0, -1)
    step = num_nodes * (batch.micro or 1)
    return next((n * sharing for n in groups if batch.global_size % (n * step) == 0), 1)


def _memory_per_worker(machine: Machine, workers: Workers) -> float:
    if workers.device == "cuda" and machine.gpus:
        return min(gpu.memory_gib for gpu in machine.gpus)
    return machine.memory_gib / workers.per_node


def _batch(
    job: JobSpec, workers: Workers, activation_bytes: int, memory_gib: float, sequence_length: int, notes: list[str]
) -> BatchArithmetic:
    sharing, asked, micro = _sharing(job), job.batch.global_size, job.batch.micro
    readers = workers.total // sharing
    step = readers * (micro or 1)
    if asked % step:
        lower, upper = asked // step * step, (asked // step + 1) * step
        nearest = upper if lower == 0 or upper - asked < asked - lower else lower
        of = _workers_word(readers) if sharing == 1 else f"{readers} groups of {_workers_word(sharing)}"
        of += f" x micro {micro}" if micro else ""
        raise InputError(f"batch.global {asked} is not a multiple of {of}; nearest: {nearest}")
    per_worker = asked // readers
    if micro is None:
        fit = max(1, int(ACTIVATION_SHARE * memory_gib * 2**30 / max(1, activation_bytes)))
        reason = f"{activation_bytes / 2**20:.1f} MiB of activations a sample, {memory_gib:.0f} GiB a worker"
        if not activation_bytes:
            reason = "a worker's whole share: what the model needs is not known before it is built"
        if workers.device == "cpu" and sequence_length:
            in_cache = max(1, MAX_MICRO_TOKENS_ON_CPU // sequence_length)
            if in_cache < fit:
                fit, reason = in_cache, f"at most {MAX_MICRO_TOKENS_ON_CPU} tokens at a time on a CPU"
        micro = next(n for n in range(min(fit, per_worker), 0, -1) if per_worker % n == 0)
        notes.append(f"batch.micro: {micro} ({reason})")
    return BatchArithmetic(global_size=asked, micro=micro, accumulation=per_worker // micro)


def _sharing(job: JobSpec) -> int:
    """How many neighbouring workers compute each of their samples together."""
    strategy = component.load("strategies", job.strategy.name)
    return int(strategy.sharing(job.strategy)) if hasattr(strategy, "sharing") else 1


def _workers_word(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"


def _train(job: JobSpec, workers: Workers, machine: Machine, is_cheap: bool, notes: list[str]) -> Train:
    train = replace(job.train, loading=_loading(job.train.loading, workers, is_cheap, notes))
    if train.precision != "auto":
        return train
    if workers.device == "cuda":
        has_bf16 = all(gpu.computes_bf16 for gpu in machine.gpus)
    else:
        has_bf16 = machine.cores_compute_bf16
    precision = "bf16" if has_bf16 else "fp32"
    what = "GPUs" if workers.device == "cuda" else "cores"
    notes.append(f"train.precision: {precision} (these {what} {'have' if has_bf16 else 'lack'} bf16 arithmetic)")
    return replace(train, precision=precision)


def _loading(loading: Loading, workers: Workers, is_cheap: bool, notes: list[str]) -> Loading:
    if loading.workers != "auto":
        return loading
    num = 0 if is_cheap else min(MAX_LOADERS, workers.threads)
    cores = f"{workers.threads} core{'' if workers.threads == 1 else 's'} a worker, {MAX_LOADERS} at most"
    notes.append(f"train.loading.workers: {num} ({'these batches are cheap to read' if is_cheap else cores})")
    return replace(loading, workers=num)


def _check_precision(job: JobSpec, cluster: ClusterSpec, workers: Workers) -> None:
    """Raises `InputError` for a number format that the GPUs of the cluster file do not compute in."""
    gpus = cluster.machine.gpus if cluster.machine is not None else ()
    if job.train.precision == "bf16" and workers.device == "cuda" and not all(gpu.computes_bf16 for gpu in gpus):
        raise InputError(
            f"train.precision bf16: the GPUs of cluster {cluster.name!r} ({gpus[0].name}) do not compute in it;"
            " write fp16, or auto"
        )


def _schedule(job: JobSpec, notes: list[str]) -> Schedule:
    schedule, steps = job.schedule, job.train.steps
    if schedule.warmup_steps >= steps and schedule.warmup_steps:
        raise InputError(f"schedule.warmup_steps {schedule.warmup_steps} is not below train.steps {steps}")
    if schedule.name != "wsd":
        return replace(schedule, decay_steps=None)
    decay = schedule.decay_steps
    if decay is None:
        decay = max(1, min(steps // 5, steps - schedule.warmup_steps))
        notes.append(f"schedule.decay_steps: {decay} (a fifth of {steps} steps)")
    if schedule.warmup_steps + decay > steps:
        raise InputError(
            f"schedule.warmup_steps {schedule.warmup_steps} + decay_steps {decay} is more than train.steps {steps}"
        )
    return replace(schedule, decay_steps=decay)


def _evaluate(job: JobSpec, notes: list[str]) -> Evaluate:
    if job.evaluate.every_steps is not None:
        return job.evaluate
    notes.append(f"evaluate.every_steps: {job.train.steps} (at the end only)")
    return replace(job.evaluate, every_steps=job.train.steps)


def _checkpoint(job: JobSpec, notes: list[str]) -> Checkpoint:
    if job.checkpoint.every_steps is not None:
        return job.checkpoint
    notes.append(f"checkpoint.every_steps: {job.train.steps} (at the end only)")
    return replace(job.checkpoint, every_steps=job.train.steps)
