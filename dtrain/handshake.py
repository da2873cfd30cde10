"""Do client and cluster fit each other? Asked by the driver before it asks for a GPU, and answered with the way out.

The client writes what it has into the run's folder; the driver, on a head without GPUs, compares that with what its own
image has. Versions are read from what is installed; nothing of it is imported.

    python -m dtrain.handshake     what this Python has, as JSON; `--text` for people
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dtrain import __version__
from dtrain.errors import ClusterError
from dtrain.finding import Finding, Say
from dtrain.plan import AnyPlan, Plan, plan_of
from dtrain.settings import Settings, from_kept, to_json
from dtrain.storage import NotThere, Storage

RECORD = "versions.json"
ALWAYS = ("ray", "torch")
"""Packages that every run needs on the cluster."""
WATCHED = (*ALWAYS, "accelerate", "datasets", "deepspeed", "msgspec", "numpy", "peft", "tokenizers", "transformers")
"""Packages whose versions are kept in the run's folder."""
CUDA_LINE = re.compile(r"^cuda\b[^=]*=\s*'([^']+)'", re.MULTILINE)


class Versions(Settings, forbid_unknown_fields=False):
    """What one Python has; what another dtrain may add to it is passed over."""

    python: str
    dtrain: str
    code: str = ""
    """What dtrain's own sources hold, as a short word."""
    packages: dict[str, str] = {}
    """Of those that are watched, the ones that are installed."""
    cuda: str | None = None
    """The CUDA that torch was built for; None for a build for CPUs, or no torch."""


@cache
def mine() -> Versions:
    """What this Python has."""
    found = {}
    for name in WATCHED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Versions(
        python=platform.python_version(), dtrain=__version__, code=_digest_of_code(), packages=found, cuda=torch_cuda()
    )


def torch_cuda() -> str | None:
    """The CUDA version torch was built for; None for a CPU build, or no torch."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return None
    try:
        match = CUDA_LINE.search((Path(found.origin).parent / "version.py").read_text())
    except OSError:
        return None
    return match[1] if match else None


def _digest_of_code() -> str:
    root = Path(__file__).resolve().parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        contents = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(contents)}\n".encode())
        found.update(contents)
    return found.hexdigest()[:12]


# -- judging ---------------------------------------------------------------------------------------------------


def compare(client: Versions | None, cluster: Versions, plan: AnyPlan) -> list[Finding]:
    """What does not fit, of a client (where it is known), a cluster's image and a plan; nothing when all does.

    Equal they must be in dtrain's own code, in Python's major and minor version, and in Ray's, where the client has
    one. Other packages may differ, which is said of those that the plan uses.
    """
    found = [*_lacking(cluster, plan)]
    if client is not None:
        found += [*_differing(client, cluster), *_packages(client, cluster, plan)]
    return found


def _lacking(cluster: Versions, plan: AnyPlan) -> Iterator[Finding]:
    """What the plan needs and the image has not."""
    for name, what in _needed(plan).items():
        if name not in cluster.packages:
            yield Finding(
                name,
                "problem",
                f"the image has no {name}, which {what} needs",
                f"build one with it, as clusters/image/Dockerfile does, or add `RUN pip install {name}` to your own",
            )
    if plan.workers.device == "cuda" and cluster.cuda is None and "torch" in cluster.packages:
        yield Finding(
            "torch",
            "problem",
            f"the plan is for GPUs, and torch {cluster.packages['torch']} in the image is a build for CPUs",
            "name an image built for CUDA in the cluster file (clusters/image/README.md), or set device: cpu there",
        )


def _differing(client: Versions, cluster: Versions) -> Iterator[Finding]:
    """What must be equal and is not."""
    if client.dtrain != cluster.dtrain:
        yield Finding(
            "dtrain",
            "problem",
            f"the client has dtrain {client.dtrain}, the image {cluster.dtrain}",
            f"name an image of dtrain {client.dtrain} in the cluster file, or use dtrain {cluster.dtrain} here",
        )
    elif client.code != cluster.code:
        yield Finding(
            "dtrain",
            "problem",
            f"the image's dtrain {client.dtrain} has other sources ({cluster.code}) than the client's ({client.code})",
            "build the image anew from the client's sources (clusters/image), under a new tag",
        )
    if _first(client.python, 2) != _first(cluster.python, 2):
        yield Finding(
            "python",
            "problem",
            f"the client has Python {client.python}, the image {cluster.python}",
            f"use Python {_first(cluster.python, 2)} here: make PYTHON=python{_first(cluster.python, 2)}; or build the"
            f" image with --build-arg PYTHON={_first(client.python, 2)}",
        )
    here, there = client.packages.get("ray"), cluster.packages.get("ray")
    if here and there and _first(here, 3) != _first(there, 3):
        yield Finding(
            "ray",
            "problem",
            f"the client has Ray {here}, the image {there}",
            f"run here: pip install 'ray[default,train,tune]=={there}'; or build the image with Ray {here}",
        )


def _packages(client: Versions, cluster: Versions, plan: AnyPlan) -> Iterator[Finding]:
    """What may differ."""
    for name in _needed(plan):
        here, there = client.packages.get(name), cluster.packages.get(name)
        if name != "ray" and here and there and _release(here) != _release(there):
            yield Finding(
                name,
                "warning",
                f"the client has {name} {here}, the image {there}",
                f"results may differ from those here; for equal ones: pip install '{name}=={_release(there)}'",
            )


def _needed(plan: AnyPlan) -> dict[str, str]:
    """The watched packages that a plan needs, and what needs them."""
    found = dict.fromkeys(ALWAYS, "every run")
    if not isinstance(plan, Plan):
        return found
    strategy = plan.strategy.name
    if strategy in ("deepspeed", "accelerate"):
        found[strategy] = f"strategy {strategy}"
    if getattr(plan.strategy, "engine", None) == "deepspeed":
        found["deepspeed"] = f"strategy {strategy} with engine deepspeed"
    if plan.model.name == "pretrained":
        found["transformers"] = "model pretrained"
        if getattr(plan.model, "lora", None) is not None:
            found["peft"] = "model pretrained with lora"
    if plan.data.name == "huggingface":
        found["datasets"] = "data huggingface"
    return found


def _release(version: str) -> str:
    """Without what a build adds: `2.13.0+cpu` and `2.13.0` are one release."""
    return version.partition("+")[0]


def _first(version: str, parts: int) -> str:
    return ".".join(_release(version).split(".")[:parts])


# -- asking ----------------------------------------------------------------------------------------------------


def record(storage: Storage, run_id: str) -> None:
    """On the client, at every submit: write down what it has. Raises `StorageError`."""
    storage.write(f"{run_id}/{RECORD}", to_json(mine()).encode())


def check(storage: Storage, run_id: str, say: Say | None = None) -> None:
    """On the cluster, before anything is reserved: `say` what may matter.

    Raises `ClusterError`, with a line for each, when something does not fit that must; `NotThere` without a plan.
    """
    client, cluster = _of_client(storage, run_id), mine()
    # Another dtrain's plan may not even be readable here: first what does not depend on it.
    found = list(_differing(client, cluster)) if client is not None else []
    if not found:
        found = compare(client, cluster, plan_of(storage, run_id))
    for finding in found:
        if finding.state == "warning" and say is not None:
            say(f"{finding.text}; {finding.remedy}")
    problems = [finding for finding in found if finding.state == "problem"]
    if problems:
        raise ClusterError("\n".join(f"{finding.text}; {finding.remedy}" for finding in problems))


def _of_client(storage: Storage, run_id: str) -> Versions | None:
    """What the client wrote down."""
    try:
        found = storage.read(f"{run_id}/{RECORD}")[0]
    except NotThere:
        return None
    return from_kept(found, Versions, f"{storage.uri}/{run_id}/{RECORD}")


def text(versions: Versions) -> str:
    """In one line, for people."""
    built = f"CUDA {versions.cuda}" if versions.cuda else "CPU"
    packages = [f"{name} {v}{f' ({built})' * (name == 'torch')}" for name, v in versions.packages.items()]
    return ", ".join([f"dtrain {versions.dtrain} ({versions.code})", f"Python {versions.python}", *packages])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dtrain.handshake", description="What this Python has.")
    parser.add_argument("--text", action="store_true", help="in one line, for people")
    words = parser.parse_args()
    print(text(mine()) if words.text else to_json(mine()))


if __name__ == "__main__":
    main()
