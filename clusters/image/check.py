"""Has an image what a run asks of it? Tried in the image, as the last step of its build, or in a pod:

    python /opt/dtrain/check.py

Says what it has, and ends with 1 and a line for each thing that is not as it must be.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

PROGRAMS = ("python", "ray", "dtrain", "wget", "grep")
"""KubeRay starts Ray by name from a shell, and its probes call wget and grep."""
IMPORTED = ("torch", "ray.train.torch", "ray.dashboard.head", "dtrain.runtime.driver", "dtrain.runtime.rank")
"""What is imported by everything that starts in a pod."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Has this image what a run asks of it?")
    parser.add_argument("--torch", help="the build of torch that was asked for: cpu, cu130, ...")
    asked = parser.parse_args().torch
    wrong = [*user(os.getuid()), *programs(PROGRAMS), *imports(IMPORTED), *compiled(), *writable()]
    if asked is not None:
        import torch

        wrong += build_of_torch(asked, torch.version.cuda)
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        from dtrain import handshake

        print(handshake.text(handshake.mine()))
    return 1 if wrong else 0


def user(uid: int) -> Iterator[str]:
    if uid == 0:
        yield "it runs as root; pods of a run must not: USER 1000:1000"


def programs(names: Iterable[str]) -> Iterator[str]:
    """In the shell that KubeRay starts Ray from, and in a login shell, which makes a PATH of its own."""
    for name in names:
        for words in ("-c", "-lc"):
            if subprocess.run(["bash", words, f"command -v {name}"], capture_output=True).returncode:
                yield f"`bash {words}` does not find {name}"


def imports(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            yield f"{name} cannot be imported: {type(error).__name__}: {error}"


def compiled() -> Iterator[str]:
    """Where .pyc files are missing, Ray's processes compile for longer than Ray waits for them."""
    missing = []
    for name, module in sorted(sys.modules.items()):
        cached = getattr(getattr(module, "__spec__", None), "cached", None)
        if isinstance(cached, str) and cached.endswith(".pyc") and not os.path.exists(cached):
            missing.append(name)
    if missing:
        yield f"{len(missing)} modules are not compiled ({', '.join(missing[:5])}); run python -m compileall as root"


def writable() -> Iterator[str]:
    for folder in (tempfile.gettempdir(), os.path.expanduser("~")):
        if not os.access(folder, os.W_OK):
            yield f"{folder} cannot be written by user {os.getuid()}"


def build_of_torch(asked: str, cuda: str | None) -> Iterator[str]:
    """An index that lacks a build falls back to another one in silence."""
    has = "cpu" if cuda is None else f"cu{cuda.replace('.', '')}"
    if has != asked:
        yield f"torch was built for {has}, and {asked} was asked for; is there such a build of this version?"


if __name__ == "__main__":
    sys.exit(main())
