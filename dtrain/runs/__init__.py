"""What happened: the run folder, its record, events and metrics, and the lease that gives it one owner.

runs/<run>/
  job.yaml         what was asked          plan.json       what was decided
  run.json         the record: state, cause, attempts, exit code; replaced whole, by the lease's owner only
  events.jsonl     every change of state and its cause, one JSON object a line
  metrics.jsonl    what training measured, one JSON object a line
  logs/            driver.log, agent-0.log, rank-0.log, ...; survive everything
  tensorboard/     event files
  samples/         pictures that the model made
  checkpoints/     step-00000100/, ...
  lease            locked while a driver or its agent lives
  stop             exists once somebody asked the run to stop

In a bucket the same names are objects: those that grow are kept in pieces (`growing`), the lease is `lease.json` with a
number that fences older owners off (`dtrain.storage.lease`), and of checkpoints `checkpoints/committed.json` says which
count.
"""

from dtrain.runs.folder import Run
from dtrain.runs.lines import iterate_lines, last_lines, read_lines
from dtrain.runs.places import create, delete, example_name, find, list_runs, new_name, opened
from dtrain.runs.record import ENDED, Attempt, Record, State

__all__ = [
    "ENDED",
    "Attempt",
    "Record",
    "Run",
    "State",
    "create",
    "delete",
    "example_name",
    "find",
    "iterate_lines",
    "last_lines",
    "list_runs",
    "new_name",
    "opened",
    "read_lines",
]
