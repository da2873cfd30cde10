"""What can be seen of the image without building it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import dtrain
from dtrain import handshake

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "clusters" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([^#=\s]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
BUILD_TOOLS = re.compile(
    r"(?<!\S)(gcc|g\+\+|make|cmake|build-essential|python3?-dev|git|ninja-build|cuda-nvcc\S*)(?!\S)"
)


def instructions() -> list[tuple[str, str]]:
    """Word and rest of each instruction, in order."""
    lines = [line for line in (IMAGE / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, rest in found]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for rest in of("ARG"))


def variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of("ENV") for pair in rest.split())


def commands() -> Iterator[str]:
    """Each command of every RUN."""
    for rest in of("RUN"):
        yield from (command.strip() for command in re.split(r"&&|; then|; fi", rest))


def copied() -> list[str]:
    return [source for rest in of("COPY") for source in rest.split()[:-1]]


def checking() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_of_image", IMAGE / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_that_is_copied_is_there_and_nothing_else_goes_to_the_builder() -> None:
    lines = (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    sent = [line.removeprefix("!") for line in rules if line.startswith("!")]
    assert rules[0] == "*"
    assert rules[-2:] == ["**/__pycache__", "**/*.pyc"]  # of a later line more counts than of an earlier one
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in sent), source
    assert all(any(source == one or source.startswith(f"{one}/") for source in copied()) for one in sent)


def test_the_base_is_pinned_and_a_python_that_dtrain_runs_on() -> None:
    assert of("FROM") == ["python:${PYTHON}-slim-bookworm"]
    version = arguments()["PYTHON"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)


def test_it_does_not_run_as_root_and_says_so_by_number() -> None:
    words = [word for word, _ in instructions()]
    assert of("USER") == ["1000:1000"]
    assert not {"COPY", "ADD"} & set(words[words.index("USER") :])
    assert any("useradd --uid 1000 --gid 1000" in command for command in commands())


def test_kuberay_gives_the_command_and_its_probes_find_wget() -> None:
    assert "ENTRYPOINT" not in [word for word, _ in instructions()]
    assert any(command.startswith("apt-get install") and command.endswith(" wget") for command in commands())


def test_variables_keep_secrets_and_gpus_of_others_out_and_compiled_files_in() -> None:
    found = variables()
    assert found["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert found["DS_BUILD_OPS"] == "0"
    assert not {"NVIDIA_VISIBLE_DEVICES", "PYTHONDONTWRITEBYTECODE", "PIP_NO_COMPILE"} & set(found)
    assert not [name for name in {**found, **arguments()} if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]
    assert any("compileall" in command and "/usr/local/lib/python3*" in command for command in commands())
    assert not [command for command in commands() if "--no-compile" in command]


def test_every_version_is_the_one_in_constraints() -> None:
    installs = [command for command in commands() if command.startswith("pip install")]
    assert len(installs) == 3
    for command in installs:
        assert "-c /opt/dtrain/constraints.txt" in command or "--no-deps --no-build-isolation" in command, command
    extras = arguments()["EXTRAS"].split(",")
    wanted = [*PROJECT["dependencies"], *(text for name in extras for text in PROJECT["optional-dependencies"][name])]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name != "dtrain":
            pinned = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), text
    assert "train" in extras


def test_no_tool_for_building_is_left_unless_it_is_asked_for() -> None:
    installs = [command for command in commands() if "apt-get install" in command]
    assert all("--no-install-recommends" in command for command in installs)
    assert [command for command in installs if BUILD_TOOLS.search(command)] == [
        "apt-get install --yes --no-install-recommends g++"
    ]
    assert arguments()["COMPILER"] == "no"
    assert any('if [ "${COMPILER}" = yes ]; then apt-get install --yes' in rest for rest in of("RUN"))
    assert any(command.startswith("rm -rf /var/lib/apt/lists") for command in commands())


@pytest.mark.parametrize("command", of("RUN"))
def test_what_is_run_is_a_shell_s_language(command: str) -> None:
    done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_tells_every_argument_with_its_default_and_the_version_of_now() -> None:
    text = (IMAGE / "README.md").read_text()
    assert dict(re.findall(r"^\| `([A-Z]+)` \| `([^`]+)` \|", text, re.MULTILINE)) == arguments()
    tags = re.findall(r"dtrain:([\d.]+)-", text + (IMAGE / "Dockerfile").read_text())
    assert set(tags) == {dtrain.__version__}


def test_dtrain_installed_as_the_image_does_is_the_client_s(tmp_path: Path) -> None:
    """Else every run would be refused for its other sources."""
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, dirs_exist_ok=True)
        else:
            (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / source)
    (tmp_path / "README.md").touch()
    quiet = ["--quiet", "--disable-pip-version-check", "--no-index", "--target", str(tmp_path / "there")]
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *quiet, str(tmp_path)]
    subprocess.run(pip, check=True, capture_output=True, timeout=60)
    words = [sys.executable, "-m", "dtrain.handshake"]
    where = {"PYTHONPATH": str(tmp_path / "there")}
    done = subprocess.run(words, cwd=tmp_path / "there", env=where, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["code"] == handshake.mine().code
    compiled = {path.name.partition(".")[0] for path in (tmp_path / "there").rglob("*.pyc")}
    assert compiled == {path.stem for path in (tmp_path / "there").rglob("*.py")}


def test_the_check_in_the_image_finds_what_is_missing(tmp_path: Path) -> None:
    check = checking()
    assert list(check.user(0)) == ["it runs as root; pods of a run must not: USER 1000:1000"]
    assert list(check.user(1000)) == []
    assert list(check.programs(["grep"])) == []
    assert list(check.programs(["no_such_program"])) == [
        "`bash -c` does not find no_such_program",
        "`bash -lc` does not find no_such_program",
    ]
    assert list(check.imports(["json", "dtrain.handshake"])) == []
    assert list(check.imports(["no_such_module"])) == [
        "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"
    ]
    assert list(check.build_of_torch("cpu", None)) == list(check.build_of_torch("cu130", "13.0")) == []
    assert len(list(check.build_of_torch("cu130", None))) == len(list(check.build_of_torch("cpu", "12.6"))) == 1


def test_the_check_in_the_image_finds_modules_that_are_not_compiled(tmp_path: Path) -> None:
    (tmp_path / "one.py").touch()
    (tmp_path / "two.py").touch()
    shutil.copy(IMAGE / "check.py", tmp_path)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "one.py"], cwd=tmp_path, check=True)
    words = "import sys, one, two, check; before = set(sys.modules) - {'one', 'two'}\n"
    words += "for name in before - {'__main__'}: del sys.modules[name]\n"
    words += "import sys; print(*check.compiled())"
    done = subprocess.run([sys.executable, "-B", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 modules are not compiled (two); run python -m compileall as root\n", done.stderr
