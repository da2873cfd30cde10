"""Where it is to run: the words of a cluster file, their types and their help. Depends on the file alone."""

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from dtrain import component
from dtrain.machine import Machine
from dtrain.settings import PositiveInt, Settings, Unfit
from dtrain.spec.job import Name

if TYPE_CHECKING:
    from dtrain.component import Named as Backend
else:
    Backend = component.union("backends")


class ClusterSpec(Settings):
    """A place to run jobs: the machines, and where their runs are kept."""

    name: Name
    """Name of the cluster."""
    description: str = ""
    """What this cluster is, in a line."""
    backend: Backend
    """How work gets there: a file in `dtrain/backends/` and its options."""
    nodes: Annotated[PositiveInt, Meta(le=100_000)] = 1
    """Machines used by one run."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What workers compute on; `auto` takes GPUs where the machine has any."""
    workers_per_node: Annotated[PositiveInt, Meta(le=4096)] | Literal["auto"] = "auto"
    """Workers on each machine; `auto` is one a GPU, or as many as cores divide the batch on CPUs."""
    memory_per_worker_gib: Annotated[float, Meta(gt=0, le=100_000)] | None = None
    """Memory one worker may fill (GPU memory on GPUs); read from the machine when left out."""
    storage: Annotated[str, Meta(min_length=1, max_length=1024)] = "runs"
    """Folder that holds the runs; a relative path starts where the command is given. Or a bucket: `s3://bucket/runs`,
    `gs://...`, `abfs://...`."""

    def __post_init__(self) -> None:
        """A backend may say what it cannot do: storage that its machines do not see, more nodes than it has."""
        reasons = {}
        for key, value in (("nodes", self.nodes), ("storage", self.storage)):
            check = getattr(self.backend, f"check_{key}", None)
            if check is not None:
                try:
                    check(value)
                except ValueError as error:
                    reasons[key] = str(error)
        if reasons:
            raise Unfit(reasons)

    @property
    def machine(self) -> Machine | None:
        """What each node has, where the file says so; None for the machine at hand."""
        described = getattr(self.backend, "machine", None)
        return described.machine() if described is not None else None
