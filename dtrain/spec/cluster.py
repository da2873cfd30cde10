"""Where it is to run: the words of a cluster file, their types and their help. Depends on the file alone."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from dtrain import component
from dtrain.component import Options
from dtrain.machine import Machine
from dtrain.spec.job import Name

if TYPE_CHECKING:
    from dtrain.component import Named as Backend
else:
    Backend = component.union("backends")


class ClusterSpec(Options):
    """A place to run jobs: the machines, and where their runs are kept."""

    name: Name
    """Name of the cluster."""
    description: str = ""
    """What this cluster is, in a line."""
    backend: Backend
    """How work gets there: a file in `dtrain/backends/` and its options."""
    nodes: Annotated[PositiveInt, Field(le=100_000)] = 1
    """Machines used by one run."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What workers compute on; `auto` takes GPUs where the machine has any."""
    workers_per_node: Annotated[PositiveInt, Field(le=4096)] | Literal["auto"] = "auto"
    """Workers on each machine; `auto` is one a GPU, or as many as cores divide the batch on CPUs."""
    memory_per_worker_gib: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """Memory one worker may fill (GPU memory on GPUs); read from the machine when left out."""
    storage: str = Field(default="runs", min_length=1, max_length=1024)
    """Folder that holds the runs; a relative path starts where the command is given. Or a bucket: `s3://bucket/runs`,
    `gs://...`, `abfs://...`."""

    @field_validator("nodes", "storage")
    @classmethod
    def _suits_the_backend(cls, value: Any, info: ValidationInfo) -> Any:
        """A backend may say what it cannot do: storage that its machines do not see, more nodes than it has."""
        backend, check = info.data.get("backend"), f"check_{info.field_name}"
        if hasattr(backend, check):
            getattr(backend, check)(value)
        return value

    @property
    def machine(self) -> Machine | None:
        """What each node has, where the file says so; None for the machine at hand."""
        described = getattr(self.backend, "machine", None)
        return described.machine() if described is not None else None
