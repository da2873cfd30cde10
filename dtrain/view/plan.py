"""A plan as a person reads it: what will run, how big it is, and what was resolved to what."""

import shlex

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dtrain.plan import AnyPlan, Plan, ScriptPlan
from dtrain.view import words

COUNTED_LATER = "parameters counted when the workers build it"


def batch(plan: Plan) -> str:
    """`64 = 2 workers x 16 micro x 2 accumulation`."""
    b = plan.batch
    workers = words.plural(plan.workers.total, "worker")
    return f"{b.global_size} = {workers} x {b.micro} micro x {b.accumulation} accumulation"


def workers(plan: AnyPlan) -> str:
    """`2 CPU workers`, `8 GPU workers on 4 nodes`."""
    w = plan.workers
    kind = "GPU" if w.device == "cuda" else "CPU"
    where = f" on {w.num_nodes} nodes" if w.num_nodes > 1 else ""
    return words.plural(w.total, f"{kind} worker") + where


def start(run_id: str, plan: Plan | ScriptPlan) -> RenderableType:
    """What is said of a plan when its run begins: the sizes that matter, and warnings."""
    parts: list[RenderableType] = []
    if isinstance(plan, ScriptPlan):
        parts += [Text.assemble((run_id, "bold"), f"  {_command(plan)}, {workers(plan)}")]
    else:
        num = plan.arithmetic.num_parameters
        model = plan.model.name + (f" of {words.count(num)} parameters" if num else "")
        facts = ", ".join([model, words.plural(plan.train.steps, "step"), workers(plan)])
        parts += [Text.assemble((run_id, "bold"), f"  {facts}"), Text(f"batch {batch(plan)}", style="dim")]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts)


def show(plan: Plan | ScriptPlan) -> RenderableType:
    """The whole plan."""
    threads = words.plural(plan.workers.threads, "thread")
    rows = [("workers", f"{workers(plan)} ({plan.workers.collectives}), {threads} each")]
    rows += _rows_of_script(plan) if isinstance(plan, ScriptPlan) else _rows(plan)
    rows += [("storage", plan.storage)]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(f"  {key}", value)
    parts: list[RenderableType] = [
        Text.assemble((plan.name, "bold"), " on ", (plan.cluster, "bold"), (f" ({plan.backend.name})", "dim")),
        table,
    ]
    if plan.notes:
        parts += [Text("\nresolved", style="bold"), bullets(plan.notes)]
    if plan.warnings:
        parts += [Text("\nwarnings", style="bold yellow"), bullets(plan.warnings)]
    return Group(*parts)


def _rows_of_script(plan: ScriptPlan) -> list[tuple[str, str]]:
    variables = plan.entrypoint.environment
    return [
        ("script", _command(plan)),
        ("started in", plan.folder),
        *([("environment", ", ".join(variables))] if variables else []),
        ("steps", "known to the script alone, and from what it reports"),
        ("checkpoints", "the script's own, in its checkpoint_dir"),
    ]


def _command(plan: ScriptPlan) -> str:
    return shlex.join([plan.entrypoint.script, *map(str, plan.entrypoint.args)])


def _rows(plan: Plan) -> list[tuple[str, str]]:
    a, train = plan.arithmetic, plan.train
    every = words.plural(plan.evaluate.every_steps or train.steps, "step")
    num = f"{words.count(a.num_parameters)} parameters" if a.num_parameters else COUNTED_LATER
    return [
        ("batch", batch(plan)),
        ("model", f"{plan.model.name}, {num}"),
        ("data", plan.data.name + (f", {words.count(a.tokens_per_step)} tokens a step" if a.tokens_per_step else "")),
        ("strategy", plan.strategy.name),
        ("steps", words.count(train.steps) + _in_all(plan)),
        ("compute", _compute(plan)),
        ("optimizer", f"{plan.optimizer.name}, peak rate {words.rate(plan.optimizer.lr)}, {_schedule(plan)}"),
        ("precision", train.precision + (", compiled" if train.compile else "")),
        ("evaluation", f"every {every} on {plan.evaluate.samples} samples, on all at the end"),
        ("checkpoints", _checkpoints(plan)),
    ]


def _compute(plan: Plan) -> str:
    flops = plan.arithmetic.flops_per_step
    if not flops:
        return "not known before the model is built"
    return f"{words.flops(flops)} a step, {words.flops(flops * plan.train.steps)} in all"


def bullets(lines: tuple[str, ...]) -> RenderableType:
    """Lines, indented as a whole so that a folded one stays readable."""
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(" ", line)
    return table


def _in_all(plan: Plan) -> str:
    a, steps = plan.arithmetic, plan.train.steps
    if a.tokens_per_step:
        return f" ({words.count(a.tokens_per_step * steps)} tokens in all)"
    return f" ({words.count(plan.batch.global_size * steps)} samples in all)"


def _schedule(plan: Plan) -> str:
    s = plan.schedule
    parts: list[str] = [s.name]
    if s.warmup_steps:
        parts.append(f"{words.plural(s.warmup_steps, 'step')} of warm-up")
    if s.decay_steps is not None:
        parts.append(f"{words.plural(s.decay_steps, 'step')} of decay")
    return ", ".join(parts)


def _checkpoints(plan: Plan) -> str:
    c = plan.checkpoint
    kept = f"the last {c.keep.last}" + (f" and the best {c.keep.best}" if c.keep.best else "")
    every = words.plural(c.every_steps or plan.train.steps, "step")
    return f"every {every}, {kept} kept; a snapshot every {words.plural(c.snapshot_every_steps, 'step')}"
