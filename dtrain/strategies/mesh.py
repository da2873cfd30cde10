"""Where a worker stands among the others, and which part of a tensor is its own. Pure arithmetic, without torch.

Workers are counted replica by replica, shard by shard, tensor group by tensor group: those that exchange most often,
the workers of a tensor group, are neighbours on one node.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """`replicas` copies of the model, each cut into `shards`, each layer computed by `tensor` workers together."""

    replicas: int
    shards: int
    tensor: int

    @classmethod
    def of(cls, num_workers: int, replicas: int, tensor: int) -> "Mesh":
        """Raises `ValueError` when the workers do not come out even."""
        if num_workers % (replicas * tensor):
            raise ValueError(f"{num_workers} workers are not {replicas} replicas of groups of {tensor}")
        return cls(replicas, num_workers // (replicas * tensor), tensor)

    @property
    def num_workers(self) -> int:
        return self.replicas * self.shards * self.tensor

    def place(self, worker: int) -> "MeshPlace":
        rest, tensor = divmod(worker, self.tensor)
        replica, shard = divmod(rest, self.shards)
        return MeshPlace(replica, shard, tensor)


@dataclass(frozen=True)
class MeshPlace:
    """One worker's place in a `Mesh`."""

    replica: int
    shard: int
    tensor: int


def chunk(size: int, num_parts: int, number: int) -> tuple[int, int]:
    """Where part `number` of `size` rows begins and how many it has, as `torch.chunk` cuts: the last get fewer."""
    each = -(-size // num_parts)
    start = min(each * number, size)
    return start, min(each, size - start)


def cut(
    shape: Sequence[int], mesh: Mesh, place: MeshPlace, tensor_dimension: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of what one worker holds of a tensor of `shape`.

    It is cut over the tensor group first, along `tensor_dimension` (None: every worker of the group holds it whole),
    then over the shards, along its rows.
    """
    at, size = [0] * len(shape), list(shape)
    if tensor_dimension is not None:
        at[tensor_dimension], size[tensor_dimension] = chunk(shape[tensor_dimension], mesh.tensor, place.tensor)
    start, size[0] = chunk(size[0], mesh.shards, place.shard)
    at[0] += start
    return tuple(at), tuple(size)
