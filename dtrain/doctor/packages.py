"""Which versions are installed, and whether they fit what dtrain declares and each other. Imports none of them."""

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping

from dtrain.finding import Finding, State
from dtrain.handshake import torch_cuda

OLDEST_PYTHON = (3, 11)
INSTALL = "run: pip install 'dtrain[train]'"
NEEDED = ("", "train")
"""Extras without which this machine cannot train (the empty one is dtrain itself)."""
OPTIONAL = {"deepspeed": "strategy deepspeed", "kubernetes": "clusters on Kubernetes"}
"""What the other extras are for."""


def installed() -> dict[str, str]:
    """Version of every distribution on the path, by normalised name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normal(name), distribution.version)
    return found


def requirements() -> dict[str, list[str]]:
    """What every installed distribution declares to need."""
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normal(name), distribution.requires or [])
    return found


def check(
    versions: Mapping[str, str],
    has_gpus: bool,
    python: tuple[int, ...] = sys.version_info[:3],
    declared: Mapping[str, list[str]] | None = None,
    cuda: str | None = None,
) -> list[Finding]:
    """Judge `versions`. `declared` are the requirements of each distribution, `cuda` is what torch was built for;
    both are read from this Python when left out."""
    declared = requirements() if declared is None else declared
    cuda = cuda or torch_cuda()
    findings = [_python(python)]
    findings += _own(versions, declared.get("dtrain"))
    findings += _misfits(versions, declared)
    findings += _known_misfits(versions, has_gpus, cuda)
    return findings


def normal(name: str) -> str:
    """A distribution's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _python(python: tuple[int, ...]) -> Finding:
    text = f"Python {'.'.join(map(str, python))}"
    if python < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding(
            "python", "problem", f"{text} is too old", f"use Python {oldest} or newer: make PYTHON=python3.12"
        )
    return Finding("python", "ok", text)


def _own(versions: Mapping[str, str], declared: list[str] | None) -> list[Finding]:
    """What dtrain itself declares, as far as this machine needs it to train."""
    if declared is None:
        return [
            Finding("packages", "problem", "dtrain is not installed in this Python", "run: pip install -e '.[train]'")
        ]
    findings, fine = [], []
    for extra in (*NEEDED, *OPTIONAL):
        for text in declared:
            name, given = _name(text), re.search(r"extra\s*==\s*['\"]([^'\"]+)", text)
            if (given[1] if given else "") != extra or name == "dtrain":
                continue
            version, wanted = versions.get(name), text.partition(";")[0].strip()
            if version is None and extra in OPTIONAL:
                findings.append(Finding(name, "ok", f"not installed; only {OPTIONAL[extra]} needs it"))
            elif version is None:
                findings.append(Finding(name, "problem", f"not installed; dtrain needs {wanted}", INSTALL))
            elif not _fits(version, text):
                state: State = "warning" if extra in OPTIONAL else "problem"
                findings.append(Finding(name, state, f"{version} is installed, dtrain needs {wanted}", _pip(wanted)))
            else:
                fine.append(f"{name} {version}")
    return [*findings, Finding("packages", "ok", ", ".join(fine))] if fine else findings


def _misfits(versions: Mapping[str, str], declared: Mapping[str, list[str]]) -> list[Finding]:
    """Installed distributions that another one declares it cannot work with, as `pip check` finds them."""
    findings = []
    for owner, texts in declared.items():
        if owner == "dtrain":
            continue
        for text in texts:
            name = _name(text)
            version = versions.get(name)
            if version is None or not _applies(text) or _fits(version, text):
                continue
            wanted = text.partition(";")[0].strip()
            findings.append(
                Finding(
                    name,
                    "warning",
                    f"{owner} {versions.get(owner, '')} wants {wanted}, and {version} is installed",
                    _pip(wanted),
                )
            )
    return findings


def _known_misfits(versions: Mapping[str, str], has_gpus: bool, cuda: str | None) -> Iterable[Finding]:
    if "s3fs" in versions and _major(versions.get("kubernetes", "0")) >= 37:
        yield Finding(
            "kubernetes",
            "problem",
            f"kubernetes {versions['kubernetes']} needs python-dateutil 3, which s3fs (botocore) refuses",
            "run: pip install 'kubernetes>=32,<37'",
        )
    nccl = sorted(name for name in versions if re.fullmatch(r"nvidia-nccl-cu\d+", name))
    if len(nccl) > 1:
        both = " and ".join(f"{name} {versions[name]}" for name in nccl)
        keep = f"nvidia-nccl-cu{_major(cuda)}" if cuda else nccl[-1]
        surplus = [name for name in nccl if name != keep] or nccl[:-1]
        yield Finding(
            "nccl",
            "problem",
            f"{both} are installed, and the one loaded first wins",
            f"run: pip uninstall -y {' '.join(surplus)} && pip install --force-reinstall --no-deps {keep}",
        )
    if has_gpus and "torch" in versions and cuda is None:
        yield Finding(
            "torch",
            "problem",
            f"torch {versions['torch']} is a build for CPUs, and this machine has GPUs",
            "run: pip install --force-reinstall torch, from an index that has the CUDA builds;"
            " or train on CPUs with device: cpu in the cluster file",
        )


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return normal(match[0]) if match else ""


def _fits(version: str, requirement: str) -> bool:
    """Whether `version` is in the range of `requirement`; true where nothing is there to compare versions with."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return True
    try:
        return Requirement(requirement).specifier.contains(version, prereleases=True)
    except InvalidRequirement:
        return True


def _applies(requirement: str) -> bool:
    """Whether a requirement holds here: its marker is true, and it belongs to no extra."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return False
    try:
        marker = Requirement(requirement).marker
    except InvalidRequirement:
        return False
    return marker is None or marker.evaluate({"extra": ""})


def _major(version: str) -> int:
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


def _pip(wanted: str) -> str:
    return f"run: pip install '{wanted}'"
