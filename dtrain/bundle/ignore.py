"""Which paths a file such as `.gitignore` leaves out: git's own syntax and precedence, also where there is no git.

A test holds this against git itself. Not there: character classes by name (`[[:alpha:]]`), for which such a pattern
matches nothing.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["out", "kept"]


@dataclass(frozen=True)
class Rule:
    """One line of such a file."""

    regex: re.Pattern[str]
    """What a path must match, relative to the folder the file lies in."""
    verdict: Verdict
    folders_only: bool

    def matches(self, name: str, is_folder: bool) -> bool:
        return (is_folder or not self.folders_only) and self.regex.fullmatch(name) is not None


class Ignored:
    """The files of these names in any folder below `root`, later names before earlier ones, and `usual` rules last."""

    def __init__(self, root: Path, file_names: Sequence[str], usual: Iterable[str] = ()) -> None:
        self._root = root
        self._file_names = file_names
        self._usual = rules(usual)
        self._rules: dict[str, list[Rule]] = {}
        self._folders: dict[str, Verdict | None] = {"": None}

    def verdict(self, name: str, is_folder: bool = False) -> Verdict | None:
        """What is said of a path, relative to the root with `/` between parts; None when nothing is.

        What lies in a folder that is left out is left out as well, whatever else is said of it.
        """
        if is_folder and name in self._folders:
            return self._folders[name]
        parent = name.rpartition("/")[0]
        found = "out" if self.verdict(parent, True) == "out" else self._own(name, is_folder)
        if is_folder:
            self._folders[name] = found
        return found

    def _own(self, name: str, is_folder: bool) -> Verdict | None:
        folder = name
        while folder:
            folder = folder.rpartition("/")[0]
            below = name[len(folder) + 1 :] if folder else name
            if (found := _last(self._rules_of(folder), below, is_folder)) is not None:
                return found
        return _last(self._usual, name, is_folder)

    def _rules_of(self, folder: str) -> list[Rule]:
        if folder not in self._rules:
            found: list[Rule] = []
            for file_name in self._file_names:
                path = self._root / folder / file_name
                if os.path.isfile(path):
                    found += rules(path.read_text("utf-8", errors="surrogateescape").removeprefix("\ufeff").split("\n"))
            self._rules[folder] = found
        return self._rules[folder]


def _last(found: Sequence[Rule], name: str, is_folder: bool) -> Verdict | None:
    return next((rule.verdict for rule in reversed(found) if rule.matches(name, is_folder)), None)


def rules(lines: Iterable[str]) -> list[Rule]:
    """What the lines of such a file say, in their order."""
    return [rule for line in lines if (rule := _rule(line)) is not None]


def _rule(line: str) -> Rule | None:
    pattern = _without_trailing_spaces(line.removesuffix("\r"))
    if not pattern or pattern.startswith("#"):
        return None
    verdict: Verdict = "out"
    if pattern.startswith("!"):
        verdict, pattern = "kept", pattern[1:]
    folders_only = pattern.endswith("/")
    pattern = pattern[:-1] if folders_only else pattern
    try:
        regex = re.compile(_regex(pattern), re.DOTALL)
    except (re.error, _Invalid):
        return None
    return Rule(regex, verdict, folders_only)


class _Invalid(Exception):
    """A pattern that matches nothing."""


def _without_trailing_spaces(line: str) -> str:
    stripped = line.rstrip(" ")
    backslashes = len(stripped) - len(stripped.rstrip("\\"))
    return stripped + " " if backslashes % 2 and stripped != line else stripped


def _regex(pattern: str) -> str:
    """Anchored to the folder when it has a slash at its start or in its middle; else at any depth."""
    out = "" if "/" in pattern else "(?:.*/)?"
    pattern = pattern.removeprefix("/")
    at = 0
    while at < len(pattern):
        char, begins = pattern[at], at == 0 or pattern[at - 1] == "/"
        at += 1
        if char == "*":
            stars = at
            while pattern[at : at + 1] == "*":
                at += 1
            crosses = begins and at > stars
            if crosses and at == len(pattern):
                out += ".+"
            elif crosses and pattern[at] == "/":
                out += "(?:.*/)?"
                at += 1
            else:
                out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "[":
            found, at = _set(pattern, at)
            out += found
        elif char == "\\":
            if at == len(pattern):
                raise _Invalid
            out += re.escape(pattern[at])
            at += 1
        else:
            out += re.escape(char)
    return out


def _set(pattern: str, at: int) -> tuple[str, int]:
    """The regular expression of the set whose first character is at `at`, and where the text goes on behind it."""
    is_negated = pattern[at : at + 1] in ("!", "^")
    at += is_negated
    members, first = "", True
    while at < len(pattern) and (pattern[at] != "]" or first):
        if pattern.startswith("[:", at):
            raise _Invalid
        if pattern[at] == "\\":
            at += 1
        if at + 1 < len(pattern) and pattern[at + 1] == "-" and pattern[at + 2 : at + 3] not in ("", "]"):
            low, high = pattern[at], pattern[at + 2]
            if high == "\\":
                at += 1
                high = pattern[at + 2 : at + 3]
            # Of a range the wrong way round its beginning is left.
            members += f"{re.escape(low)}-{re.escape(high)}" if low <= high else re.escape(low)
            at += 3
        else:
            members += re.escape(pattern[at : at + 1])
            at += 1
        first = False
    if at >= len(pattern):
        raise _Invalid
    if not members:
        return ("[^/]" if is_negated else "(?!)"), at + 1
    return (f"(?!/)[^{members}]" if is_negated else f"(?!/)[{members}]"), at + 1
