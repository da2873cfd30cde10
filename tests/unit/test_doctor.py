"""Every finding of the doctor can be made to fail, and then says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import cli, doctor
from dtrain.doctor import host, packages
from dtrain.finding import Finding
from dtrain.machine import Gpu, Machine
from dtrain.view import doctor as view

DECLARED = {
    "dtrain": [
        "click>=8.1",
        'torch>=2.8; extra == "train"',
        'ray[default,train,tune]>=2.50; extra == "train"',
        'deepspeed>=0.18; extra == "deepspeed"',
        'kubernetes<37,>=32; extra == "kubernetes"',
        'pytest>=9; extra == "dev"',
    ],
}
FINE = {"click": "8.3", "torch": "2.13.0+cpu", "ray": "2.60.0", "deepspeed": "0.19.8", "kubernetes": "36.0.3"}


def judge(changes=None, declared=None, has_gpus=False, python=(3, 11, 7), cuda=None):
    """States, texts and remedies of what is not ok, by area."""
    versions = {name: version for name, version in {**FINE, **(changes or {})}.items() if version}
    found = packages.check(versions, has_gpus, python, {**DECLARED, **(declared or {})}, cuda)
    return {f.area: f for f in found if f.state != "ok"}


def test_what_fits_is_ok_and_named():
    assert judge() == {}
    found = packages.check(FINE, False, (3, 11, 7), DECLARED)
    assert [f.area for f in found] == ["python", "packages"]
    assert "torch 2.13.0+cpu" in found[1].text
    assert "pytest" not in found[1].text


def test_an_old_python():
    found = judge(python=(3, 10, 4))["python"]
    assert found.state == "problem"
    assert "3.10.4" in found.text
    assert "3.11" in found.remedy


def test_a_version_out_of_range():
    found = judge({"torch": "2.4.1"})["torch"]
    assert (found.state, found.remedy) == ("problem", "run: pip install 'torch>=2.8'")
    assert "2.4.1" in found.text


def test_a_missing_package_that_training_needs():
    found = judge({"ray": None})["ray"]
    assert found.state == "problem"
    assert "dtrain[train]" in found.remedy


def test_a_missing_package_that_few_need_is_ok_and_says_for_what():
    versions = {k: v for k, v in FINE.items() if k != "deepspeed"}
    found = {f.area: f for f in packages.check(versions, False, (3, 12, 0), DECLARED)}
    assert found["deepspeed"] == Finding("deepspeed", "ok", "not installed; only strategy deepspeed needs it")


def test_dtrain_not_installed():
    found = [f for f in packages.check(FINE, False, (3, 11, 7), {}) if f.state == "problem"]
    assert [f.text for f in found] == ["dtrain is not installed in this Python"]


def test_kubernetes_beside_s3fs():
    found = judge({"kubernetes": "37.0.0", "s3fs": "2026.9.0"})["kubernetes"]
    assert found.state == "problem"
    assert found.remedy.endswith("'kubernetes>=32,<37'")


def test_two_nccl_keep_the_one_torch_was_built_for():
    both = {"nvidia-nccl-cu12": "2.27.5", "nvidia-nccl-cu13": "2.28.9"}
    found = judge(both, cuda="13.0")["nccl"]
    assert found.state == "problem"
    assert "uninstall -y nvidia-nccl-cu12 " in found.remedy
    assert "nccl" not in judge({"nvidia-nccl-cu13": "2.28.9"}, cuda="13.0")


def test_a_cpu_build_beside_gpus(monkeypatch):
    monkeypatch.setattr(packages, "torch_cuda", lambda: None)
    assert judge(has_gpus=True)["torch"].state == "problem"
    assert "torch" not in judge(has_gpus=True, cuda="13.0")


def test_packages_that_refuse_each_other():
    found = judge({"torchvision": "0.20"}, {"torchvision": ["torch==2.5.0", "pillow>=5", "ray<1; extra == 'x'"]})
    assert list(found) == ["torch"]
    assert found["torch"].state == "warning"
    assert "torchvision 0.20 wants torch==2.5.0" in found["torch"].text


def test_this_python_is_read_without_importing_torch():
    code = "import dtrain.doctor, sys; from dtrain.doctor import packages; packages.check(packages.installed(), False)"
    code += "; print(*(m for m in ('torch', 'ray', 'numpy') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


# -- the machine -----------------------------------------------------------------------------------------------


def test_this_machine_is_looked_at_whole():
    found = host.check(Machine(2, 8.0, (Gpu("H200", 141.0),)))
    areas = [f.area for f in found]
    for area in ("processor", "gpu 0", "system", "shared memory", "loopback", "ports", "open files", "compiler"):
        assert area in areas


def test_little_memory():
    found = host.devices(Machine(1, 0.5))
    assert ("memory", "warning") in [(f.area, f.state) for f in found]


@pytest.mark.parametrize(("free", "state"), [(64 << 20, "problem"), (512 << 20, "warning"), (4 << 30, "ok")])
def test_shared_memory_against_a_snapshot(free, state):
    found = host.shared_memory(free)
    assert found.state == state
    assert f"{free >> 20:,} MiB free" in found.text
    assert state == "ok" or "--shm-size" in found.remedy


def test_no_shared_memory_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path / "nowhere")
    assert host.shared_memory().state == "problem"


def test_an_address_nobody_answers_at():
    assert host.loopback("127.0.0.1").state == "ok"
    found = host.loopback("192.0.2.1", timeout_s=0.2)  # TEST-NET-1, RFC 5737: never this machine's
    assert found.state == "problem"
    assert "ip link set lo up" in found.remedy


def test_no_loopback_interface(monkeypatch):
    monkeypatch.setattr(host.socket, "if_nameindex", lambda: [(1, "eth0")])
    assert host.loopback().state == "problem"


def test_ports_inside_those_of_ray():
    assert host.ports().state == "ok"
    found = host.ports((10002, 19999))
    assert found.state == "problem"
    assert "ip_local_port_range" in found.remedy


def test_ports_that_are_taken():
    low = next(p for p in range(30000, 60000, 10) if host.ports((p, p + 7)).state == "ok")
    with host.socket.socket() as taken:
        taken.bind(("127.0.0.1", low + 3))
        found = host.ports((low, low + 7))
    assert found.state == "problem"
    assert "only 7" in found.text


@pytest.mark.parametrize(("limit", "state"), [(64, "problem"), (512, "warning"), (1024, "ok"), (-1, "ok")])
def test_open_files(limit, state):
    assert host.files(limit).state == state


def test_a_temporary_folder_too_deep_for_sockets(tmp_path):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    found = host.temporary_folder(deep)
    assert found.state == "problem"
    assert "TMPDIR" in found.remedy
    assert host.temporary_folder(Path("/tmp")).state == "ok"


@pytest.mark.parametrize("path", ["/proc/runs", "file/runs", "file"])
def test_a_folder_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file").touch()
    found = host.folder("runs folder", tmp_path / path, "choose another")
    assert (found.state, found.remedy) == ("problem", "choose another")


def test_a_folder_is_left_as_it_was(tmp_path):
    assert host.folder("runs folder", tmp_path / "a" / "b", "x").state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "LITTLE_SPACE", 1 << 60)
    assert host.folder("runs folder", tmp_path, "x").state == "warning"


def test_no_pidfd(monkeypatch):
    def refuse(_pid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(host.os, "pidfd_open", refuse)
    assert host.system().state == "problem"
    monkeypatch.setattr(host.sys, "platform", "darwin")
    assert "darwin" in host.system().text


def test_no_compiler_is_no_warning():
    assert host.compiler(None).state == "ok"


# -- the whole -------------------------------------------------------------------------------------------------


def test_without_torch_no_rank_is_started(monkeypatch):
    versions = {k: v for k, v in packages.installed().items() if k != "torch"}
    monkeypatch.setattr(packages, "installed", lambda: versions)
    monkeypatch.setattr(doctor.ranks, "check", lambda *_: pytest.fail("ranks were started"))
    found = doctor.examine(lambda _: None)
    assert found[-1].area == "ranks"
    assert {f.area for f in found if f.state == "problem"} == {"torch"}


def test_a_finding_that_is_not_ok_has_a_remedy():
    with pytest.raises(AssertionError):
        Finding("x", "problem", "broken")


OK = Finding("ports", "ok", "fine")
WARNING = Finding("memory", "warning", "little", "get more")
PROBLEM = Finding("loopback", "problem", "down", "bring it up")


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([OK], 0, "this machine can train"),
        ([OK, WARNING], 0, "this machine can train (1 warning above)"),
        ([PROBLEM, PROBLEM, WARNING], 5, "2 problems, 1 warning above"),
    ],
)
def test_the_command_says_it_and_ends_with_a_code(found, code, said, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda say: found)
    monkeypatch.setattr(sys, "argv", ["dtrain", "doctor"])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    printed = capsys.readouterr()
    assert leave.value.code == code
    assert said in printed.err
    for finding in found:
        assert finding.text in printed.out
        assert finding.remedy in printed.out


def test_the_command_speaks_json(monkeypatch, capsys):
    import json

    monkeypatch.setattr(doctor, "examine", lambda say: [OK, PROBLEM])
    monkeypatch.setattr(sys, "argv", ["dtrain", "doctor", "--json"])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 5
    assert json.loads(capsys.readouterr().out)[1] == {
        "area": "loopback",
        "state": "problem",
        "text": "down",
        "remedy": "bring it up",
    }


def test_verdicts_count():
    assert view.verdict([PROBLEM]).startswith("this machine cannot train as it is: 1 problem above")
