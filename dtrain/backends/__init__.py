"""Where a run goes. A backend is one file here, found by its name, with these things in it:

- `Options`: its settings (`dtrain.component.Options`);
- `render(plan, run_path) -> Submission`: the very thing that `send` will send; never touches the network;
- `send(submission, options, say) -> None`: hand the run over; returns as soon as the cluster has it.
  `say(text)` tells the person waiting what is going on. Raises `ClusterError`;
- `cluster_up(options, say)`, `cluster_status(options) -> dict`, `cluster_down(options) -> list[str]`:
  the cluster itself; `cluster_down` returns what was ended, a line each.

Backends and the runtime share the plan and one entry-point string, nothing else.
"""

from dtrain.component import Options

DRIVER = "dtrain.runtime"
"""The module a backend starts on the cluster, with the run folder as its argument."""


class Submission(Options):
    """What is sent: printed by `--dry-run`, sent by `submit`."""

    backend: str
    entrypoint: tuple[str, ...]
    run_path: str
    resources: dict[str, float]
    """What the run reserves on each node, in Ray's words (CPU, GPU)."""
    num_nodes: int
