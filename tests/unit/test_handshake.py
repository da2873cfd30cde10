"""Versions that do not fit are said before a GPU is asked for, with the way out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundling import TASK, a_plan_of, a_script_plan, write
from making import FOUR_GPUS, TWO_CORES, a_cluster, a_job, a_plan
from msgspec import to_builtins

import dtrain
from dtrain import handshake
from dtrain.errors import ClusterError, StorageError
from dtrain.handshake import Versions, compare
from dtrain.planning import make_plan
from dtrain.settings import convert, from_json
from dtrain.spec.job import JobSpec
from dtrain.storage import at

PACKAGES = {"ray": "2.60.0", "torch": "2.13.0"}


def having(**changes: Any) -> Versions:
    packages = {**PACKAGES, **changes.pop("packages", {})}
    packages = {name: version for name, version in packages.items() if version}
    return Versions(**{"python": "3.11.7", "dtrain": "0.1.0", "code": "0123", **changes, "packages": packages})


def said(client: Versions | None, cluster: Versions, plan: Any = None) -> dict[str, tuple[str, str]]:
    """State and text of each finding, by area."""
    return {f.area: (f.state, f.text) for f in compare(client, cluster, plan or a_plan())}


def remedies(client: Versions | None, cluster: Versions, plan: Any = None) -> str:
    return "; ".join(finding.remedy for finding in compare(client, cluster, plan or a_plan()))


def test_what_is_equal_fits() -> None:
    assert said(having(), having()) == {}
    assert said(None, having()) == {}


def test_what_does_not_matter_may_differ() -> None:
    client = having(python="3.11.2", packages={"torch": "2.13.0+cpu", "numpy": "2.0", "peft": "0.1"})
    assert said(client, having(cuda="13.0", packages={"numpy": "2.4", "peft": "0.2"})) == {}
    enough_to_submit = having(packages={"ray": "", "torch": ""})
    assert said(enough_to_submit, having()) == {}


@pytest.mark.parametrize(
    ("client", "cluster", "area", "text", "remedy"),
    [
        ({"dtrain": "0.2.0"}, {}, "dtrain", "the client has dtrain 0.2.0, the image 0.1.0", "an image of dtrain 0.2.0"),
        (
            {"code": "4567"},
            {},
            "dtrain",
            "has other sources (0123) than the client's (4567)",
            "build the",
        ),
        ({"python": "3.12.1"}, {}, "python", "Python 3.12.1, the image 3.11.7", "make PYTHON=python3.11; or build"),
        ({}, {"packages": {"ray": "2.60.1"}}, "ray", "Ray 2.60.0, the image 2.60.1", "ray[default,train,tune]==2.60.1"),
        ({}, {"packages": {"ray": ""}}, "ray", "the image has no ray, which every run needs", "RUN pip install ray"),
        ({}, {"packages": {"torch": ""}}, "torch", "the image has no torch", "clusters/image/Dockerfile"),
    ],
)
def test_what_must_be_equal_is_a_problem(
    client: dict[str, Any], cluster: dict[str, Any], area: str, text: str, remedy: str
) -> None:
    ((found, (state, words)),) = said(having(**client), having(**cluster)).items()
    assert (found, state) == (area, "problem")
    assert text in words
    assert remedy in remedies(having(**client), having(**cluster))


def test_another_version_and_its_other_sources_are_one_problem() -> None:
    assert len(compare(having(dtrain="0.2.0", code="4567"), having(), a_plan())) == 1


def test_another_torch_is_a_warning_with_the_version_to_install() -> None:
    cluster = having(packages={"torch": "2.12.1+cu130"})
    assert said(having(), cluster) == {"torch": ("warning", "the client has torch 2.13.0, the image 2.12.1+cu130")}
    assert "pip install 'torch==2.12.1'" in remedies(having(), cluster)


@pytest.mark.parametrize(
    ("changes", "package", "what"),
    [
        ({"strategy": {"name": "deepspeed"}}, "deepspeed", "strategy deepspeed"),
        ({"strategy": {"name": "accelerate"}}, "accelerate", "strategy accelerate"),
        ({"strategy": {"name": "accelerate", "engine": "deepspeed"}}, "deepspeed", "with engine deepspeed"),
    ],
)
def test_a_package_is_asked_for_where_the_plan_uses_it(changes: dict[str, Any], package: str, what: str) -> None:
    plan = a_plan(**changes)
    others = {"deepspeed": "1", "accelerate": "1"}
    state, words = said(having(), having(packages={**others, package: ""}), plan)[package]
    assert state == "problem"
    assert what in words
    assert said(having(packages=others), having(packages=others), plan) == {}
    differing = said(having(packages=others), having(packages={**others, package: "2"}), plan)
    assert differing == {package: ("warning", f"the client has {package} 1, the image 2")}
    assert said(having(packages={package: "1"}), having(packages={package: "2"})) == {}


def test_data_and_models_of_other_libraries_ask_for_them(tmp_path: Path) -> None:
    shape = {"vocab_size": 4096, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 512}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **shape}
    write(tmp_path, {"model/config.json": json.dumps(config), "task.py": TASK})
    asked = to_builtins(a_job())
    asked["model"] = {"name": "pretrained", "source": str(tmp_path / "model"), "lora": {"rank": 2}}
    plan = make_plan(convert(asked, JobSpec), a_cluster(), TWO_CORES, tmp_path)
    assert set(said(having(), having(), plan)) == {"transformers", "peft"}
    rows = a_plan_of(tmp_path, data={"name": "huggingface", "source": "rows", "samples": {"name": "tokens"}})
    assert set(said(having(), having(), rows)) == {"datasets"}


def test_a_plan_for_gpus_needs_a_torch_for_gpus() -> None:
    plan = a_plan(machine=FOUR_GPUS)
    state, words = said(None, having(), plan)["torch"]
    assert state == "problem"
    assert "the plan is for GPUs, and torch 2.13.0 in the image is a build for CPUs" in words
    assert said(None, having(cuda="13.0"), plan) == {}


def test_a_script_needs_no_more_than_ray_and_torch(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": ""})
    plan = a_script_plan(tmp_path)
    assert said(having(), having(), plan) == {}
    assert set(said(having(), having(packages={"ray": "", "torch": ""}), plan)) == {"ray", "torch"}


def test_the_driver_hears_what_the_client_has_through_the_storage(tmp_path: Path) -> None:
    storage = at(str(tmp_path))
    storage.write("tiny-1/plan.json", a_plan().to_json().encode())
    words: list[str] = []
    handshake.check(storage, "tiny-1", words.append)  # a client that left no word
    handshake.record(storage, "tiny-1")
    handshake.check(storage, "tiny-1", words.append)
    assert words == []
    written = json.loads(storage.read("tiny-1/versions.json")[0])
    written["packages"]["torch"] = "1.0"
    storage.write("tiny-1/versions.json", json.dumps(written).encode())
    handshake.check(storage, "tiny-1", words.append)
    assert len(words) == 1
    assert words[0].startswith("the client has torch 1.0, the image ")


def test_another_dtrain_is_named_before_its_plan_is_read_which_may_have_other_words(tmp_path: Path) -> None:
    storage = at(str(tmp_path))
    storage.write("tiny-1/plan.json", b'{"format": 99}')
    handshake.record(storage, "tiny-1")
    written = json.loads(storage.read("tiny-1/versions.json")[0])
    written |= {"dtrain": "9.9", "python": "3.99.0", "mood": "good"}
    storage.write("tiny-1/versions.json", json.dumps(written).encode())
    with pytest.raises(ClusterError) as refused:
        handshake.check(storage, "tiny-1")
    lines = refused.value.message.splitlines()
    assert [line.partition(", the image")[0] for line in lines] == [
        "the client has dtrain 9.9",
        "the client has Python 3.99.0",
    ]


@pytest.mark.parametrize("name", ["plan.json", "versions.json"])
@pytest.mark.parametrize("data", [b'{"format": 1, ', b"[]", b"\xff", b'{"python": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    storage = at(str(tmp_path))
    storage.write("tiny-1/plan.json", a_plan().to_json().encode())
    handshake.record(storage, "tiny-1")
    storage.write(f"tiny-1/{name}", data)
    with pytest.raises(StorageError, match=f"{tmp_path}/tiny-1/{name} is damaged"):
        handshake.check(storage, "tiny-1")


def test_this_python_is_read_without_importing_what_is_heavy() -> None:
    words = (
        "import sys; from dtrain import handshake, settings;"
        "print(settings.to_json(handshake.mine()).replace(chr(10), chr(32)));"
        "print({'torch', 'ray', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=True)
    first, second = done.stdout.splitlines()
    assert second == "set()"
    assert from_json(first, Versions) == handshake.mine()
    assert handshake.mine().dtrain == dtrain.__version__
    assert handshake.mine().packages["torch"]


def test_the_word_for_the_sources_is_theirs_alone(tmp_path: Path) -> None:
    """Neither where they lie nor when they were written."""
    here = Path(dtrain.__file__).parent
    shutil.copytree(here, tmp_path / "dtrain", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dtrain" / "runtime" / "driver.pyc").touch()

    def there() -> str:
        words = [sys.executable, "-m", "dtrain.handshake"]
        done = subprocess.run(
            words, cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=60, check=True
        )
        return str(json.loads(done.stdout)["code"])

    assert there() == handshake.mine().code
    with (tmp_path / "dtrain" / "runtime" / "driver.py").open("a") as source:
        source.write("\n")
    assert there() != handshake.mine().code


def test_an_image_says_in_a_line_what_it_has() -> None:
    assert (
        handshake.text(having(cuda="13.0"))
        == "dtrain 0.1.0 (0123), Python 3.11.7, ray 2.60.0, torch 2.13.0 (CUDA 13.0)"
    )
    words = [sys.executable, "-m", "dtrain.handshake", "--text"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{handshake.text(handshake.mine())}\n"
