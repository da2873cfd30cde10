"""What of a plan's paths is moved, and what is not."""

from pathlib import Path

import pytest
from bundling import TASK, a_plan_of, a_script_plan, write
from making import a_plan
from msgspec import to_builtins
from msgspec.structs import replace

from dtrain.bundle import rebase

NEW = "/node/code/0123"


def test_nothing_but_the_paths_of_ones_own_code_changes(tmp_path: Path) -> None:
    root = write(tmp_path / "p", {"task.py": TASK, "sub/my_data.py": "def open_data(**options): ...\n"})
    options = {"folder": f"{root}/data", "n": 3}
    plan = a_plan_of(
        root / "sub",
        {"name": "custom", "build": "../task.py:build", "options": options},
        {"name": "custom", "open": "./my_data.py:open_data", "options": options, "path": ".."},
    )
    moved = rebase(plan, str(root), NEW)
    before, after = to_builtins(plan), to_builtins(moved)
    assert after["model"] == {**before["model"], "build": f"{NEW}/task.py:build", "path": f"{NEW}/sub"}
    assert after["data"] == {**before["data"], "open": f"{NEW}/sub/my_data.py:open_data", "path": NEW}
    assert after["model"]["options"] == after["data"]["options"] == options
    assert after["code"] == {path.replace(str(root), NEW): known for path, known in before["code"].items()}
    same = {key for key in before if before[key] == after[key]}
    assert same == set(before) - {"model", "data", "code"}
    assert type(moved).from_json(moved.to_json()) == moved
    assert rebase(moved, NEW, str(root)) == plan


def test_a_script_is_moved_and_its_arguments_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "p", {"src/train.py": "", "configs/x": ""})
    monkeypatch.chdir(root / "configs")
    given = {"args": ["--data", f"{root}/data", 3], "environment": {"WHERE": str(root)}}
    plan = a_script_plan(root, script="src/train.py", **given)
    moved = rebase(plan, str(root), NEW)
    assert moved.entrypoint == replace(plan.entrypoint, script=f"{NEW}/src/train.py")
    assert moved.folder == f"{NEW}/configs"
    assert rebase(plan, str(root), NEW, lambda path: path != f"{NEW}/configs").folder == NEW  # an empty one, perhaps
    monkeypatch.chdir(tmp_path)
    assert rebase(a_script_plan(root, script="src/train.py"), str(root), NEW).folder == NEW


def test_a_folder_whose_name_begins_alike_is_another(tmp_path: Path) -> None:
    write(tmp_path, {"p/task.py": TASK, "p2/train.py": ""})
    plan = a_script_plan(tmp_path / "p2")
    moved = rebase(plan, str(tmp_path / "p"), NEW)
    assert moved.entrypoint == plan.entrypoint
    assert moved.code == {}


def test_data_of_the_project_is_moved_where_it_came_along(tmp_path: Path) -> None:
    root = write(tmp_path / "p", {"task.py": TASK, "few.csv": "a,b\n1,2\n"})
    data = {"name": "table", "source": ["few.csv", "many/*.csv", "/data/x.csv"], "target": "b", "features": ["a"]}
    plan = a_plan_of(root, data=data)
    moved = rebase(plan, str(root), NEW, lambda path: path == f"{NEW}/few.csv")
    assert moved.data.source == (f"{NEW}/few.csv", f"{root}/many/*.csv", "/data/x.csv")
    assert rebase(plan, str(root), NEW).data.source[1] == f"{NEW}/many/*.csv"


def test_a_tokenizer_of_the_project_is_moved_where_it_came_along(tmp_path: Path) -> None:
    root = write(tmp_path / "p", {"task.py": TASK})
    samples = {"name": "tokens", "tokenizer": {"name": "file", "path": "t.json", "vocab_size": 100}}
    plan = a_plan_of(root, data={"name": "huggingface", "source": "rows", "samples": samples})
    moved = rebase(plan, str(root), NEW, lambda path: path.endswith("t.json"))
    assert moved.data.samples.tokenizer.path == f"{NEW}/t.json"
    assert moved.data.source == f"{root}/rows"


def test_a_transform_of_ray_data_is_moved(tmp_path: Path) -> None:
    root = write(tmp_path / "p", {"t.py": "def f(dataset): ...\n"})
    samples = {"name": "table", "target": "b", "features": ["a"]}
    model = {"name": "mlp"}
    data = {"name": "ray_data", "source": "/data/*.csv", "read": "csv", "transform": "./t.py:f", "samples": samples}
    plan = a_plan_of(root, model, data)
    moved = rebase(plan, str(root), NEW)
    assert (moved.data.transform, moved.data.path) == (f"{NEW}/t.py:f", NEW)
    assert list(moved.code) == [f"{NEW}/t.py"]


def test_a_plan_of_shipped_parts_stays_as_it_is(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    assert rebase(plan, str(tmp_path), NEW) == plan
