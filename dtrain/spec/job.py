"""What is asked: the words of a job file, their types and their help. Depends on the file alone."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, field

from dtrain import component
from dtrain.settings import Says, Settings, one_of

if TYPE_CHECKING:
    from dtrain.component import Named as Data
    from dtrain.component import Named as Model
    from dtrain.component import Named as Strategy
else:
    Model = component.union("models")
    Data = component.union("data")
    Strategy = component.union("strategies")

Name = Annotated[
    str,
    Meta(pattern=r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?\Z"),
    Says("at most 40 of a-z, 0-9, - and _, beginning and ending with a letter or digit"),
]
MAX_STEPS = 10**9
NumSteps = Annotated[int, Meta(gt=0, le=MAX_STEPS)]
NumTimes = Annotated[int, Meta(ge=0, le=10**6)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Rate = Annotated[float, Meta(gt=0, le=1000)]
Penalty = Annotated[float, Meta(ge=0, le=1000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Batch(Settings):
    """How many samples one optimizer step sees, over all workers together."""

    global_size: Annotated[int, Meta(gt=0, le=2**24)] = field(name="global")
    """Samples in one optimizer step, whatever the number of workers; the only batch size you must give."""
    micro: Annotated[int, Meta(gt=0, le=2**24)] | None = None
    """Samples one worker puts through the model at a time; derived from memory when left out."""


class AdamW(Settings):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); fused where torch has it."""

    name: Literal["adamw"]
    lr: Rate
    """Peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares."""
    eps: Annotated[float, Meta(gt=0, le=1)] = 1e-8
    """Added to the denominator so that it is never zero."""
    weight_decay: Penalty = 0.1
    """Decay of matrices; vectors (biases, norms) are never decayed."""


class SGD(Settings):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    lr: Rate
    """Peak learning rate."""
    momentum: BelowOne = 0.9
    """Share of the last update carried into the next."""
    nesterov: bool = False
    """Look ahead along the momentum before taking the gradient."""
    weight_decay: Penalty = 0.0
    """L2 penalty on matrices; vectors (biases, norms) are never decayed."""


if TYPE_CHECKING:
    Optimizer = AdamW | SGD
else:
    Optimizer = one_of(AdamW, SGD)


class Schedule(Settings):
    """How the learning rate moves over the steps, as a share of the optimizer's `lr`."""

    name: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after warm-up; `wsd` is warm-up, stable, decay."""
    warmup_steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    """Steps over which the rate rises in a line from zero to its peak."""
    decay_steps: NumSteps | None = None
    """Steps of the final decay of `wsd`; a fifth of all steps when left out."""
    final: Fraction = 0.1
    """Share of the peak that is left at the last step."""


class StopEarly(Settings):
    """When a run has learnt what it can."""

    patience: Annotated[int, Meta(gt=0, le=10**6)] = 5
    """Evaluations in a row that may bring no better held-out loss."""
    min_delta: Annotated[float, Meta(ge=0, le=10**6)] = 0.0
    """How much lower a loss must be to count as better."""


class Loading(Settings):
    """Reading batches ahead, in processes of their own."""

    workers: Literal["auto"] | Annotated[int, Meta(ge=0, le=256)] = "auto"
    """Processes beside each worker that read ahead for it; `auto` is none where a batch costs next to nothing, else one
    for each of the worker's cores, 4 at most."""
    prefetch: Annotated[int, Meta(gt=0, le=256)] = 2
    """Micro batches that each of them keeps ready."""


class Train(Settings):
    """The training loop."""

    steps: NumSteps
    """Optimizer steps in the whole run."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Start of every random number: weights, sample order, dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass, weights and optimizer state stay fp32; `auto` is bf16 where the
    hardware computes in it; fp16 scales its losses so that small gradients survive."""
    clip_grad_norm: Annotated[float, Meta(gt=0, le=10**9)] | None = 1.0
    """Largest norm of all gradients together; `null` turns clipping off."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass to save memory: not at all, in every second block, or in all."""
    ema: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights that remembers this share of itself each step, and evaluate with it."""
    stop_early: StopEarly | None = None
    """End before the last step when the held-out loss no longer falls."""
    loading: Loading = Loading()
    """Reading batches ahead, in processes of their own."""
    log_every_steps: NumSteps = 10
    """Steps between two lines of metrics."""


class Evaluate(Settings):
    """Measuring on held-out data."""

    every_steps: NumSteps | None = 100
    """Steps between two evaluations; `null` evaluates at the end only."""
    samples: Annotated[int, Meta(gt=0, le=2**40)] = 64
    """Held-out samples of an evaluation during training; the one at the end uses all of them."""


class Keep(Settings):
    """Which checkpoints stay on storage."""

    last: Annotated[int, Meta(gt=0, le=10**6)] = 2
    """How many of the newest checkpoints stay."""
    best: NumTimes = 1
    """How many of those with the lowest held-out loss stay as well."""


class Checkpoint(Settings):
    """What survives, and how often it is put aside."""

    every_steps: NumSteps | None = 100
    """Steps between two checkpoints on storage; `null` writes only the last one."""
    snapshot_every_steps: NumSteps = 10
    """Steps between two snapshots in shared memory, from which a lost worker is replaced."""
    keep: Keep = Keep()
    """Which checkpoints stay on storage."""


class Retry(Settings):
    """How often a failure of each class may be survived before the run ends."""

    killed: NumTimes = 20
    """Workers ended by a signal: out of memory, a crash in native code, somebody's kill."""
    hung: NumTimes = 5
    """Workers that stopped making progress."""
    exited: NumTimes = 5
    """Workers that left before the work was done."""
    agent: NumTimes = 5
    """Losses of the process that watches a node's workers."""
    driver: NumTimes = 5
    """Losses of the process that drives the run."""
    without_progress: Annotated[int, Meta(gt=0, le=10**6)] = 3
    """Failures in a row, of any class, with no new step completed in between."""
    hang_timeout_s: Seconds = 120.0
    """Longest silence of a worker in seconds; shorter once its usual pace is known."""
    start_timeout_s: Seconds = 900.0
    """Longest wait in seconds for a worker's first step (loading, compiling)."""


class JobSpec(Settings):
    """A dtrain job: what to train, on what data, for how long."""

    name: Name
    """Name of the job; runs are called after it."""
    description: str = ""
    """What the job learns, in a line."""
    model: Model
    """The network and its task: a file in `dtrain/models/` and its options."""
    data: Data
    """What it learns from: a file in `dtrain/data/` and its options."""
    batch: Batch
    """Batch sizes."""
    optimizer: Optimizer
    """The optimizer and its settings."""
    schedule: Schedule = Schedule()
    """The learning rate over time."""
    train: Train
    """The training loop."""
    evaluate: Evaluate = Evaluate()
    """Measuring on held-out data."""
    checkpoint: Checkpoint = Checkpoint()
    """Snapshots and checkpoints."""
    strategy: Strategy = field(default_factory=lambda: _default_strategy())
    """How the model is spread over workers: a file in `dtrain/strategies/` and its options."""
    retry: Retry = Retry()
    """What failures are survived, and how often."""


class Entrypoint(Settings):
    """A script of your own, started on every worker as `torchrun` or `accelerate launch` would."""

    script: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Python file; a relative path starts at the job file's folder."""
    args: tuple[str | int | float, ...] = ()
    """What the script finds behind its name in `sys.argv`; `{checkpoint_dir}` in it is the run's folder for
    checkpoints, the same in every attempt."""
    environment: dict[str, str] = {}
    """Environment variables the script finds besides those of its launch; they are kept in the run folder."""


class ScriptSpec(Settings):
    """A dtrain job that runs a script of your own, which brings its own model, data and checkpoints."""

    name: Name
    """Name of the job; runs are called after it."""
    description: str = ""
    """What the job learns, in a line."""
    entrypoint: Entrypoint
    """The script, instead of a model, data and all that belongs to them."""
    retry: Retry = Retry()
    """What failures are survived, and how often."""


SHORT_FORMS = {"model": ("custom", "build"), "data": ("custom", "open")}
"""`model: ./task.py:build` is short for `{name: custom, build: ./task.py:build}`."""


def _default_strategy() -> Any:
    return component.with_name("ddp", component.load("strategies", "ddp").Options)()
