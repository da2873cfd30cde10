"""Every error dtrain raises on purpose, and the exit code it ends a command with.

    DtrainError            1   something dtrain itself got wrong, or nobody foresaw
    |-- InputError         2   a file, an option or a name the user gave is wrong
    |-- TrainingError      3   the user's code or data made training fail; trying again would not help
    |-- RetriesExhausted   4   ranks, nodes or storage kept failing until the retry budget was spent
    |-- ClusterError       5   the cluster cannot be reached, refused the work, or went away
    |-- StorageError       6   the run's storage cannot be written, or holds no valid checkpoint
    `-- Stopped          130   somebody asked the run to stop

A message says where, what, and the next move. These cross process boundaries, so all of them pickle:
the message is the only argument.
"""


class DtrainError(Exception):
    """Base of all; `exit_code` is what a command ends with, `kind` is what a run record stores."""

    exit_code = 1
    kind = "internal"

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else self.kind


class InputError(DtrainError):
    exit_code = 2
    kind = "input"


class TrainingError(DtrainError):
    exit_code = 3
    kind = "training"


class RetriesExhausted(DtrainError):
    exit_code = 4
    kind = "retries-exhausted"


class ClusterError(DtrainError):
    exit_code = 5
    kind = "cluster"


class StorageError(DtrainError):
    exit_code = 6
    kind = "storage"


class Stopped(DtrainError):
    exit_code = 130
    kind = "stopped"


def from_kind(kind: str, message: str) -> DtrainError:
    """The error a run record names, as an exception again (unknown kinds become `DtrainError`)."""
    classes: dict[str, type[DtrainError]] = {c.kind: c for c in DtrainError.__subclasses__()}
    return classes.get(kind, DtrainError)(message)
