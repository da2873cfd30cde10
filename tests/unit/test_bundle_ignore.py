"""What an ignore file leaves out, held against git itself."""

import random
import re
import subprocess
from pathlib import Path

from dtrain.bundle.ignore import Ignored

TREE = (
    "a", "b.py", "c/a", "c/b.py", "c/d/a", "c/d/b.py", "ab/a", "ab/ba/b.py", "d/c/d/a", "a.b/x y", "!a", "#b", "x ",
    "ca/[a]", "d/a-b", "c/c/c/c/c",
)  # fmt: skip
WRITTEN = (
    ["a"], ["/a"], ["a/"], ["c/a"], ["*.py"], ["*", "!*.py"], ["*", "!*/", "!*.py"], ["c/*", "!c/d/"], ["c/**"],
    ["**/a"], ["c/**/a"], ["**"], ["c/**/**/a"], ["[ab]"], ["[!a]"], ["[^a]*"], ["[a-c]"], ["[]a]"], ["[]-a]"],
    [r"\!a"], [r"\#b"], ["#b"], ["x "], [r"x\ "], [r"x\\ "], ["x?"], ["?"], ["c/?/a"], ["[z-a]"], ["[a"], ["\\"],
    ["ca/[[]a]"], [r"ca/\[a\]"], ["d/a[+--]b"], ["c/d", "!c/d/a"], ["**a"], ["/"], ["//"], ["c/d/", "!c/d/"],
    ["!"], ["/*/a"], ["*/d/a"], [r"[\a]"], ["d[/]a"], ["a.b/", "!a.b/x y"], ["*\r", "!b.py\r"], ["c/**/"], ["/**"],
)  # fmt: skip
PARTS = (*"abcd.*?/!-\\ [", "**", "]", "[ab]", "[!c]", "/**/", "**/")
NUM_DRAWN = 400
STARS_WITHIN = re.compile(r"[^/!]\*\*")
"""`a**`: git compares unrelated addresses to see whether such stars begin the pattern, so that its answer varies."""


def drawn(number: int) -> dict[str, list[str]]:
    """Files in some folders, with a few lines each, of what is special to git."""
    draw = random.Random(number)
    lines = lambda: ["".join(draw.choices(PARTS, k=draw.randint(1, 6))) for _ in range(draw.randint(0, 4))]  # noqa: E731
    found = {folder: lines() for folder in ("", "c", "c/d") if draw.random() < 0.6}
    return {folder: [line for line in some if not STARS_WITHIN.search(line)] for folder, some in found.items()}


def test_ignore_files_say_what_they_say_to_git(tmp_path: Path) -> None:
    cases = [*({"": lines} for lines in WRITTEN), *(drawn(number) for number in range(NUM_DRAWN))]
    ours: dict[str, bool] = {}
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        for name in TREE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        for below, lines in case.items():
            (folder / below / ".gitignore").write_text("\n".join(lines))
        ignored = Ignored(folder, (".gitignore",))
        ours |= {f"{number}/{name}": ignored.verdict(name) == "out" for name in TREE}
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    done = subprocess.run(
        ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "-z", "--stdin"],
        input="\0".join(ours).encode(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    gits = set(done.stdout.decode().split("\0"))
    wrong = [(name, cases[int(name.partition("/")[0])], out) for name, out in ours.items() if out != (name in gits)]
    assert wrong == []
    assert 0.1 < sum(ours.values()) / len(ours) < 0.9


def test_later_files_and_rules_of_ones_own_win_over_the_usual(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.bin\n")
    (tmp_path / ".dtrainignore").write_text("!keep.bin\n!runs/\n")
    ignored = Ignored(tmp_path, (".gitignore", ".dtrainignore"), ["/runs/", ".*"])
    said = {name: ignored.verdict(name) for name in ("a.bin", "keep.bin", "runs/a", ".env", "sub/.env/x", "a.py")}
    assert said == {
        "a.bin": "out",
        "keep.bin": "kept",
        "runs/a": None,
        ".env": "out",
        "sub/.env/x": "out",
        "a.py": None,
    }
