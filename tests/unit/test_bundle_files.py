"""Which files of a project are sent."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
from bundling import TASK, a_plan_of, a_script_plan, git, repository, write
from making import a_plan

from dtrain import bundle
from dtrain.bundle import archive, files
from dtrain.errors import InputError


def sent(plan: object, folder: Path | None = None) -> set[str]:
    """Names in the archive that is made of a plan's project."""
    packed = bundle.pack(plan, folder)
    assert packed is not None
    return {item.name for item in archive.open_verified(packed.archive, packed.shipped.digest, "here")}


def test_in_a_repository_all_that_git_sees_is_sent_as_it_is_now(tmp_path: Path) -> None:
    root = repository(
        tmp_path / "project", {"jobs/task.py": TASK, "lib/a.py": "1", "gone.py": "", ".gitignore": "*.log"}
    )
    write(
        root, {"lib/a.py": "2", "new.py": "", "x.log": "", ".env": "TOKEN=1", "lib/__pycache__/a.pyc": "", "runs/r": ""}
    )
    write(root, {"env/pyvenv.cfg": "", "env/lib/x.py": "", "checkpoints/c": "", "sub/checkpoints/c.py": ""})
    (root / "gone.py").unlink()
    packed = bundle.pack(a_plan_of(root / "jobs"))
    items = {item.name: item.data for item in archive.open_verified(packed.archive, packed.shipped.digest, "here")}
    assert set(items) == {".gitignore", "jobs/task.py", "lib/a.py", "new.py", "sub/checkpoints/c.py"}
    assert items["lib/a.py"] == b"2"
    assert packed.shipped.root == str(root)
    assert (packed.shipped.num_files, packed.shipped.total_bytes) == (5, sum(map(len, items.values())))


def test_where_a_git_hook_says_another_repository_is_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "project", {"task.py": TASK})
    other = repository(tmp_path / "other", {"other.py": ""})
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert sent(a_plan_of(root)) == {"task.py"}


def test_dtrainignore_leaves_out_what_git_tracks_and_keeps_what_is_left_out_as_usual(tmp_path: Path) -> None:
    root = repository(tmp_path, {"task.py": TASK, "data/a.csv": "", "data/keep.csv": "", "notes/n.md": ""})
    write(root, {"runs/config.py": "", ".secret": ""})
    write(root, {".dtrainignore": "/data/*\n!keep.csv\n!/runs/\n", "notes/.dtrainignore": "*.md\n"})
    assert sent(a_plan_of(root)) == {"task.py", "data/keep.csv", "runs/config.py"}


def test_repositories_within_a_repository_are_sent_too(tmp_path: Path) -> None:
    library = repository(tmp_path / "library", {"lib.py": "", "lib.log": ""})
    root = repository(tmp_path / "project", {"task.py": TASK})
    git(root, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(library), "vendored")
    repository(root / "cloned", {"c.py": "", ".gitignore": "*.tmp"})
    write(root, {"cloned/new.py": "", "cloned/x.tmp": ""})
    assert sent(a_plan_of(root)) == {
        ".gitmodules",
        "task.py",
        "vendored/lib.py",
        "vendored/lib.log",
        "cloned/c.py",
        "cloned/.gitignore",
        "cloned/new.py",
    }


def test_without_git_all_is_sent_below_the_deepest_folder_with_what_the_job_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"p/jobs/job.yaml": "", "p/code/task.py": TASK, "p/x/y.py": "", "other/z.py": "", "p/.gitignore": "*.o"},
    )
    write(tmp_path, {"p/m.o": "", "p/.venv/v.py": "", "p/e/pyvenv.cfg": "", "p/e/v.py": "", "p/runs/r/plan.json": ""})
    plan = a_plan_of(tmp_path / "p/jobs", "../code/task.py:build")
    assert sent(plan) == {"jobs/job.yaml", "code/task.py", "x/y.py"}


def test_a_script_brings_its_folder_and_with_the_job_file_that_of_the_job(tmp_path: Path) -> None:
    write(tmp_path, {"p/job.yaml": "", "p/src/train.py": "", "p/src/model.py": ""})
    plan = a_script_plan(tmp_path / "p", script="src/train.py")
    assert sent(plan) == {"train.py", "model.py"}
    assert sent(plan, tmp_path / "p") == {"job.yaml", "src/train.py", "src/model.py"}


def test_a_job_made_of_shipped_parts_or_installed_packages_sends_nothing(tmp_path: Path) -> None:
    assert bundle.pack(a_plan(tmp_path)) is None
    of_a_package = a_plan_of(tmp_path, "click.core:Context")
    assert list(of_a_package.code)
    assert not bundle.needed(of_a_package)
    assert bundle.pack(of_a_package) is None


def test_large_files_that_git_does_not_track_are_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE_BYTES", 1000)
    root = repository(tmp_path, {"task.py": TASK, "tracked.bin": bytes(2000)})
    write(root, {"data.bin": bytes(2500), "small.bin": bytes(900)})
    packed = bundle.pack(a_plan_of(root))
    assert packed.left_out == ("data.bin (2.5 kB)",)
    assert sent(a_plan_of(root)) == {"task.py", "tracked.bin", "small.bin"}
    write(root, {".dtrainignore": "!data.bin\n"})
    assert sent(a_plan_of(root)) == {"task.py", "tracked.bin", "small.bin", "data.bin"}


def test_a_project_that_is_too_large_says_which_files_are_the_largest(tmp_path: Path) -> None:
    root = repository(tmp_path, {"task.py": TASK, **{f"{n}.bin": bytes(1000 * n) for n in range(1, 9)}})
    with pytest.raises(InputError) as refused:
        bundle.pack(a_plan_of(root), limit_bytes=20_000)
    said = refused.value.message
    assert f"{root} would send 36.1 kB, and at most 20 kB" in said
    assert "8.bin (8 kB), 7.bin (7 kB), 6.bin (6 kB), 5.bin (5 kB), 4.bin (4 kB);" in said
    assert str(root / ".dtrainignore") in said
    write(root, {".dtrainignore": "[5-8].bin"})
    assert bundle.pack(a_plan_of(root), limit_bytes=20_000) is not None


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 3)
    write(tmp_path, {"task.py": TASK, "a": "", "b": "", "c": ""})
    with pytest.raises(InputError, match=r"more than 3 files to send; name what .*\.dtrainignore"):
        bundle.pack(a_plan_of(tmp_path))


def test_links_within_the_project_are_sent_as_links(tmp_path: Path) -> None:
    root = repository(tmp_path / "p", {"task.py": TASK, "lib/a.py": "", "left/out.py": "", ".dtrainignore": "/left\n"})
    (root / "to_file.py").symlink_to("lib/a.py")
    (root / "lib/absolute.py").symlink_to(root / "task.py")
    (root / "to_folder").symlink_to("lib")
    (root / "through").symlink_to("to_folder/a.py")
    (root / "to_what_is_left_out").symlink_to("left/out.py")
    (root / "to_nothing").symlink_to("nothing")
    packed = bundle.pack(a_plan_of(root))
    items = archive.open_verified(packed.archive, packed.shipped.digest, "here")
    assert {item.name: item.data.decode() for item in items if item.kind == "link"} == {
        "to_file.py": "lib/a.py",
        "lib/absolute.py": "../task.py",
        "to_folder": "lib",
        "through": "lib/a.py",
    }


def test_all_that_cannot_be_sent_is_said_at_once(tmp_path: Path) -> None:
    root = write(tmp_path / "p", {"task.py": TASK})
    write(tmp_path, {"secret": ""})
    (root / "out").symlink_to("../secret")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(root, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket")  # the path itself may be too long for a socket
        os.close(here)
        with pytest.raises(InputError) as refused:
            bundle.pack(a_plan_of(root))
    assert refused.value.message.splitlines() == [
        f"{root}/out is a link out of {root}, to {tmp_path}/secret",
        f"{root}/pipe is a pipe, and only files and links can be sent",
        f"{root}/socket is a socket, and only files and links can be sent",
        f"name what the run does not need in {root}/.dtrainignore, in the words of a .gitignore",
    ]
    write(root, {".dtrainignore": "out\npipe\nsocket\n"})
    assert sent(a_plan_of(root)) == {"task.py"}


def refusal_for_nobody(root: Path) -> str:
    """What somebody is told who is not root, and owns nothing."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            files.belonging(root, with_git=False)
        except InputError as error:
            os.write(writer, error.message.encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as said:
        return said.read()


def test_what_cannot_be_read_is_said() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder) / "p", {"task.py": TASK, "closed.py": "", "closed/a.py": ""})
        Path(folder).chmod(0o755)
        assert refusal_for_nobody(root) == ""
        (root / "closed.py").chmod(0)
        assert refusal_for_nobody(root).startswith(f"{root}/closed.py cannot be read\nname what the run does not need")
        (root / "closed").chmod(0)
        assert refusal_for_nobody(root).startswith(f"{root}/closed cannot be read; name what the run does not need")


@pytest.mark.parametrize(
    ("with_git", "ignored", "name", "said"),
    [
        (True, {".gitignore": "task.py"}, "task.py", "git does not track it; run `git add -f task.py` in "),
        (True, {".dtrainignore": "*.py"}, "task.py", "a line of .dtrainignore leaves it out; change that line"),
        (False, {}, "runs/now/task.py", "what is called runs is left out; keep it with a line !/runs/ in "),
        (
            False,
            {".gitignore": "t*.py"},
            "task.py",
            "what is called task.py is left out; keep it with a line !/task.py",
        ),
        (False, {"sub/pyvenv.cfg": ""}, "sub/task.py", "it lies in a virtual environment; move it out of there"),
    ],
)
def test_code_that_the_job_names_and_would_not_be_sent_is_refused_with_the_way_out(
    tmp_path: Path, with_git: bool, ignored: dict[str, str], name: str, said: str
) -> None:
    root = write(tmp_path / "p", {"README": "", **ignored})
    if with_git:
        repository(root, {})
    write(root, {name: TASK})
    plan = a_plan_of(root, f"./{name}:build")
    with pytest.raises(InputError) as refused:
        bundle.pack(plan)
    assert f"{root / name}, which the job names, would not be sent: {said}" in refused.value.message
    if "git add -f" in said:
        git(root, "add", "-f", name)
    elif "with a line " in said:
        write(root, {".dtrainignore": said.partition("with a line ")[2].partition(" in ")[0]})
    else:
        return
    assert name in sent(plan)


def test_code_that_is_gone_since_the_plan_was_made_is_said(tmp_path: Path) -> None:
    root = write(tmp_path, {"task.py": TASK, "other.py": ""})
    plan = a_plan_of(root)
    (root / "task.py").unlink()
    with pytest.raises(InputError, match=r"task\.py, which the job names, is gone"):
        bundle.pack(plan)


def test_a_home_folder_is_never_sent_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, {"here/x.py": "", "there/task.py": TASK})
    with pytest.raises(InputError, match=rf"with all of {tmp_path}: .* have no project in common; put the job"):
        bundle.pack(a_plan_of(tmp_path / "here", "../there/task.py:build"))
    git(tmp_path, "init", "-q")  # for one's settings, as some do
    assert sent(a_plan_of(tmp_path / "there")) == {"task.py"}


def test_a_repository_that_git_cannot_read_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": TASK, ".git": "gitdir: /nowhere\n"})
    with pytest.raises(
        InputError, match=rf"git cannot say which files of {tmp_path} belong to the run: fatal: not a git"
    ):
        bundle.pack(a_plan_of(tmp_path))


def test_without_the_command_git_what_gitignore_says_holds_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "p", {"task.py": TASK, ".gitignore": "*.log"})
    write(root, {"x.log": ""})
    plan = a_plan_of(root)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sent(plan) == {"task.py"}
