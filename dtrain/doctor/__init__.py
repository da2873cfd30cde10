"""Can this machine train? Looks, computes and exchanges as a run would, and leaves nothing behind.

- `packages`: versions and their fit; reads metadata, imports nothing;
- `host`: devices, shared memory, ports, limits and folders;
- `ranks`: starts real ranks and watches them;
- `exercise`: what those ranks do (the only part that imports torch).
"""

from dtrain.doctor import host, packages, ranks
from dtrain.finding import Finding, Say
from dtrain.machine import probe

__all__ = ["Finding", "Say", "examine"]


def examine(say: Say) -> list[Finding]:
    """Everything there is to find, in the order it was looked at; `say` is told what is going on.

    A finding that is not `ok` says what to do. Takes about ten seconds on two cores, most of it importing torch.
    """
    say("looking at packages and devices")
    machine = probe()
    versions = packages.installed()
    findings = packages.check(versions, has_gpus=bool(machine.gpus))
    findings += host.check(machine)
    lacking = [name for name in ranks.NEEDS if name not in versions]
    if lacking:
        findings.append(
            Finding(
                "ranks",
                "warning",
                f"no rank was started: {', '.join(lacking)} not installed",
                f"{packages.INSTALL}, then run `dtrain doctor` again",
            )
        )
        return findings
    return findings + ranks.check(machine, say)
