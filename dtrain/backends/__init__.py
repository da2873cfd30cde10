"""Where a run goes. A backend is one file here, found by its name, with these things in it:

- `Options`: its settings (a `dtrain.settings.Settings`);
- `render(plan, run_path) -> Submission`: the very thing that `send` will send; never touches the network;
- `send(submission, options, say) -> None`: hand the run over; returns as soon as the cluster has it; handing the same
  run over twice makes no second one. `say(text)` tells the person waiting what is going on. Raises `ClusterError`;
- `cluster_up(options, say)`, `cluster_status(options) -> dict`, `cluster_down(options) -> list[str]`:
  the cluster itself; `cluster_down` returns what was ended, a line each.

And where the cluster knows more of a run than its folder does (`local` has none of these):

- `look(run_id, options) -> Sight | None`: what the cluster sees of a run; None when it knows nothing of it;
- `sights(options) -> dict[str, Sight]`: the same of all runs it knows, by id, in a few requests however many they are;
- `end(run_id, options) -> bool`: take it off the cluster, whatever it is doing; False when it was not there;
- `logs(run_id, options, which, follows) -> Iterator[bytes]`: what its pods print ("driver", "rank-0", ...);
- `check(submission, options) -> list[str]`: let the server validate what would be sent (`--dry-run=server`); what it
  warned of. Raises `ClusterError` with what it refused;
- `cluster_scale(options, num_nodes, say)`, `cluster_doctor(options) -> list[dtrain.finding.Finding]`.

Backends and the runtime share the plan and one entry-point string, nothing else.
"""

from dtrain.settings import Settings, to_json
from dtrain.sight import Phase as Phase
from dtrain.sight import Sight as Sight

DRIVER = "dtrain.runtime"
"""The module a backend starts on the cluster, with the run folder as its argument."""
REMOTE_DRIVER = "dtrain.runtime.remote"
"""The same where the driver runs on another machine: `--storage URI_OR_FOLDER --run ID`."""


class Submission(Settings):
    """What is sent: printed by `--dry-run`, sent by `submit`."""

    backend: str
    entrypoint: tuple[str, ...]
    run_path: str
    resources: dict[str, float]
    """What the run reserves on each node, in Ray's words (CPU, GPU)."""
    num_nodes: int

    def text(self) -> str:
        """What `--dry-run` prints."""
        return to_json(self)
