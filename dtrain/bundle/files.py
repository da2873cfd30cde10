"""Which files of a user's project belong to a run: those git would see, without what `.dtrainignore` leaves out.

git tracks a file, or it is new there and not ignored; without git, every file that no `.gitignore` names counts as new.
Of the new ones, what nobody means to send (hidden files, virtual environments, runs, large data) is left out as well,
unless `.dtrainignore` keeps it with a `!`.
"""

import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.bundle.ignore import Ignored
from dtrain.errors import InputError

IGNORE_FILE = ".dtrainignore"
MB = 1_000_000
LARGE_BYTES = 20 * MB
"""A file larger than this that git does not track is data, not code."""
MAX_FILES = 20_000
USUAL = (
    ".*",  # .git, .venv, .env with its passwords, what tools keep
    "__pycache__/",
    "*.pyc",
    "*.egg-info/",
    "node_modules/",
    "venv/",
    "/runs/",
    "/checkpoints/",
    "/wandb/",
    "/mlruns/",
    "/lightning_logs/",
)
"""What is left out of the files that git does not track."""
GIT_TIMEOUT_S = 60
MOST_NAMED = 5


@dataclass(frozen=True)
class Found:
    """What belongs to a run. Names are relative to the root, with `/` between parts, sorted."""

    files: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    """Name and target, the target relative to the link's folder and passing through no other link."""
    large: tuple[str, ...]
    """What was left out for its size alone."""


def repository(folder: Path) -> Path | None:
    """The top of the git repository that a folder lies in; None outside of one, and without git."""
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
    except FileNotFoundError:
        return None
    return Path(os.fsdecode(top.removesuffix(b"\n")))


def belonging(root: Path, with_git: bool) -> Found:
    """The files of the project at `root`, a real path. Raises `InputError` for all that cannot be sent, at once."""
    files: list[str] = []
    links: list[tuple[str, str]] = []
    large, wrong = [], []
    for candidate in _candidates(root, with_git):
        path = root / candidate.name
        try:
            status = path.lstat()
        except FileNotFoundError:  # deleted, and git has not been told
            continue
        except PermissionError:
            wrong.append(f"{path} cannot be read")
            continue
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(path)
            if not Path(target).is_relative_to(root):
                wrong.append(f"{path} is a link out of {root}, to {target}")
            links.append((candidate.name, os.path.relpath(target, path.parent)))
        elif not stat.S_ISREG(status.st_mode):
            wrong.append(f"{path} is {_kind(status.st_mode)}, and only files and links can be sent")
        elif not os.access(path, os.R_OK):
            wrong.append(f"{path} cannot be read")
        elif status.st_size > LARGE_BYTES and not candidate.is_meant:
            large.append(candidate.name)
        else:
            files.append(candidate.name)
        if len(files) + len(links) > MAX_FILES:
            raise InputError(f"{root} has more than {MAX_FILES:,} files to send; {advice(root)}")
    if wrong:
        more = [f"and {len(wrong) - MOST_NAMED} more"] if len(wrong) > MOST_NAMED else []
        raise InputError("\n".join([*wrong[:MOST_NAMED], *more, advice(root)]))
    return Found(tuple(sorted(files)), tuple(sorted(_leading_somewhere(files, links))), tuple(sorted(large)))


def advice(root: Path) -> str:
    """The next move when too much, or something strange, would be sent."""
    return f"name what the run does not need in {root / IGNORE_FILE}, in the words of a .gitignore"


def why_not(root: Path, name: str, with_git: bool) -> str:
    """Why a file that is there does not belong to the run, and the next move."""
    if Ignored(root, (IGNORE_FILE,)).verdict(name) == "out":
        return f"a line of {IGNORE_FILE} leaves it out; change that line"
    if with_git:
        return f"git does not track it; run `git add -f {name}` in {root}"
    ignored = Ignored(root, (".gitignore", IGNORE_FILE), USUAL)
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        above, is_folder = "/".join(parts[:depth]), depth < len(parts)
        if ignored.verdict(above, is_folder) == "out":
            line = f"!/{above}{'/' * is_folder}"
            return f"what is called {parts[depth - 1]} is left out; keep it with a line {line} in {root / IGNORE_FILE}"
    return "it lies in a virtual environment; move it out of there"


@dataclass(frozen=True)
class _Candidate:
    name: str
    is_meant: bool
    """git tracks it, or `.dtrainignore` keeps it by name: then it is sent whatever its size."""


def _candidates(root: Path, with_git: bool) -> Iterator[_Candidate]:
    new = Ignored(root, (IGNORE_FILE,), USUAL)
    if not with_git:
        yield from _walked(root, "", Ignored(root, (".gitignore", IGNORE_FILE), USUAL))
        return
    tracked = Ignored(root, (IGNORE_FILE,))
    environments: dict[str, bool] = {}
    for name, is_tracked in _listed(root, ""):
        verdict = (tracked if is_tracked else new).verdict(name)
        if verdict == "out" or (not is_tracked and _is_in_environment(root, name, environments)):
            continue
        yield _Candidate(name, is_tracked or verdict == "kept")


def _listed(root: Path, prefix: str) -> Iterator[tuple[str, bool]]:
    """What git sees below a folder, and whether it is tracked; repositories within it are looked into."""
    folder = root / prefix
    for words, is_tracked in ((["--cached"], True), (["--others", "--exclude-standard"], False)):
        entries = os.fsdecode(_git(folder, "ls-files", "-z", *words)).split("\0")
        for entry in dict.fromkeys(entries):  # a file in conflict is listed thrice
            name = f"{prefix}{entry}".rstrip("/")
            path = root / name
            if not entry or path.is_symlink() or not path.is_dir():
                if entry:
                    yield name, is_tracked
            elif (path / ".git").exists():
                yield from _listed(root, f"{name}/")


def _git(folder: Path, *words: str) -> bytes:
    """What a git command prints. Raises `FileNotFoundError` without git, `InputError` when it refuses."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], env=environment, capture_output=True, timeout=GIT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"`git -C {folder} {' '.join(words)}` gave no answer within {GIT_TIMEOUT_S} s; run it by hand to see why"
        ) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise InputError(f"git cannot say which files of {folder} belong to the run: {said}")
    return done.stdout


def _walked(root: Path, prefix: str, ignored: Ignored) -> Iterator[_Candidate]:
    folder = root / prefix
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        raise InputError(f"{folder} cannot be read; {advice(root)}") from None
    if prefix and any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        is_folder = entry.is_dir(follow_symlinks=False)
        verdict = ignored.verdict(name, is_folder)
        if verdict == "out":
            continue
        if not is_folder:
            yield _Candidate(name, verdict == "kept")
        else:
            yield from _walked(root, f"{name}/", ignored)


def _is_in_environment(root: Path, name: str, known: dict[str, bool]) -> bool:
    """Whether a path lies in a virtual environment, whatever that is called."""
    folder = name.rpartition("/")[0]
    if not folder:
        return False
    if folder not in known:
        known[folder] = os.path.exists(root / folder / "pyvenv.cfg") or _is_in_environment(root, folder, known)
    return known[folder]


def _leading_somewhere(files: list[str], links: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The links whose target is sent as well: one to what is left out is left out."""
    there = {"."}
    for name in files:
        while name and name not in there:
            there.add(name)
            name = name.rpartition("/")[0]
    for name, target in links:
        if os.path.normpath(os.path.join(os.path.dirname(name), target)) in there:
            yield name, target


def _kind(mode: int) -> str:
    kinds = {stat.S_ISSOCK: "a socket", stat.S_ISFIFO: "a pipe", stat.S_ISDIR: "a folder"}
    return next((word for test, word in kinds.items() if test(mode)), "a device")
