"""Data parallelism: every worker holds the whole model, gradients are averaged (torch DistributedDataParallel)."""

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat

from dtrain import component

if TYPE_CHECKING:
    from dtrain.plan import Workers
    from dtrain.spec.job import JobSpec


class Options(component.Options):
    """Every worker holds the whole model; gradients are averaged while the backward pass runs."""

    bucket_mib: PositiveFloat = Field(default=25.0, le=4096.0)
    """Gradients are sent in buckets of this many MiB."""
    static_graph: bool = False
    """Promise that every step uses the same parameters, which saves bookkeeping."""


def check(options: Options, job: "JobSpec", workers: "Workers") -> None:
    """DDP does everything a job can ask for."""
