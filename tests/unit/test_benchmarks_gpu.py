"""The benchmarks of GPUs: what can be seen of them on a machine without one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from alone import Keeper

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as `python -m tests.benchmarks` finds itself

from dtrain.machine import Gpu, Machine, probe
from dtrain.plan import Plan
from dtrain.planning import make_plan
from dtrain.runtime import rank
from dtrain.spec import load
from dtrain.training import loop
from tests.benchmarks import __main__ as command
from tests.benchmarks import gpu_gan, gpu_gpt2, gpu_resnet, harness, on_device, pictures, ready
from tests.benchmarks.on_device import Measured

without_gpu = pytest.mark.skipif(bool(probe().gpus), reason="for machines without a GPU")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"name: bench\nbackend: {{name: local}}\nstorage: {tmp_path}/runs\n")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planned(file: Path, cluster: Path, *settings: str) -> Plan:
    asked = load.load_both(file, cluster, [*on_device.ON_ONE_CORE, *settings])
    return make_plan(*asked, on_device.ONE_CORE, file.parent)


def trained(plan: Plan) -> dict[str, torch.Tensor]:
    """The weights that dtrain's own loop comes to."""
    training, _ = rank._build(plan, loop.Place(0, 1, torch.device("cpu")))
    loop.train(training, 0, Keeper())
    return {f"{n}.{k}": t for n, part in training.task.parts.items() for k, t in part.state_dict().items()}


def by_hand(plan: Plan, num_steps: int) -> dict[str, torch.Tensor]:
    rival = ready.rival(plan, torch.device("cpu"))
    rival.run(num_steps)
    return {f"{n}.{k}": t for n, part in rival.task.parts.items() for k, t in part.state_dict().items()}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((t.double() - theirs[name].double()).abs().max()) for name, t in ours.items())


def test_gpt2_by_hand_trains_to_the_same_weights(cluster):
    """With accumulation, clipping and a rate that changes."""
    small = ("data.held_out_limit=256", "data.sequence_length=16", "model.num_layers=1", "model.width=16")
    plan = planned(
        gpu_gpt2.JOB, cluster, *gpu_gpt2.TINY, *small, "train.steps=8", "train.precision=fp32", "optimizer.lr=6.0e-3"
    )
    assert plan.batch.accumulation == 2
    ours = trained(plan)
    assert apart(ours, by_hand(plan, 8)) < 1e-5
    assert apart(ours, by_hand(plan, 7)) > 1e-4


def test_resnet_by_hand_trains_to_the_same_weights(cluster, tmp_path):
    """A few steps: after them, batch norm over so few numbers has made much of the least difference."""
    pictures.draw(tmp_path / "ready", 64, 32)
    drawn = (f"data.options.folder={tmp_path / 'ready'}", "data.shape.height=32", "data.shape.width=32")
    settings = (*gpu_resnet.TINY, *drawn, "train.steps=2", "train.precision=fp32", "train.loading.workers=0")
    plan = planned(harness.JOBS / "gpu_resnet50.yaml", cluster, *settings, "batch.global=16", "optimizer.lr=0.01")
    assert apart(trained(plan), by_hand(plan, 2)) < 1e-4


def test_a_gan_by_hand_learns(cluster, tmp_path):
    pictures.draw(tmp_path / "ready", 64, 16)
    drawn = (f"data.options.folder={tmp_path / 'ready'}", "data.shape.height=16", "data.shape.width=16")
    plan = planned(
        harness.JOBS / "gpu_dcgan.yaml", cluster, *gpu_gan.TINY, *drawn, "train.steps=20", "train.precision=fp32"
    )
    rival = ready.rival(plan, torch.device("cpu"))
    before = {name: t.clone() for name, t in rival.generator.state_dict().items()}
    rival.run(10)
    first = rival.last_loss
    rival.run(10)
    assert rival.last_loss < first, "noise is not hard to tell from what an untrained generator makes"
    assert not torch.equal(before["first.weight"], rival.generator.state_dict()["first.weight"])


def test_operations_are_those_of_palm(cluster):
    """6 N + 12 L H Q T a token; N without learned positions."""
    plan = planned(gpu_gpt2.JOB, cluster)
    model, length = plan.model, plan.data.sequence_length
    num = plan.arithmetic.num_parameters - length * model.width
    expected = 6 * num + 12 * model.num_layers * model.num_heads * (model.width // model.num_heads) * length
    assert plan.arithmetic.flops_per_step / plan.arithmetic.tokens_per_step == expected


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", None),
        ("one core", None),
    ],
)
def test_a_device_is_known_by_its_name(device, peak):
    assert gpu_gpt2.peak_of(device) == peak


def test_losses_that_are_apart_are_shouted(cluster):
    plan = planned(gpu_gpt2.JOB, cluster, *gpu_gpt2.TINY)
    alike = Measured(plan, [0.5, 0.5], [0.25, 0.25], (2.0, 2.01), "NVIDIA H200", 3.25)
    assert "2,000 : 4,000 tokens/s; losses 2.000 : 2.010;" in alike.says("tokens/s", 1000)
    assert "3.2 GiB together; NVIDIA H200" in alike.says("tokens/s", 1000)
    other = Measured(plan, [0.5], [0.25], (2.0, 2.1), "one core", 0.0)
    assert "LOSSES 2.000 : 2.100" in other.says("tokens/s", 1000)
    assert "losses 2.000 : 2.100" in other.says("steps/s", 1, is_same=False)
    lost = Measured(plan, [0.5], [0.25], (float("nan"), 2.1), "one core", 0.0)
    assert "LOSSES nan" in lost.says("tokens/s", 1000)


def test_a_machine_with_gpus_in_words():
    gpus = (Gpu("NVIDIA H200", 140.0),) * 2
    assert harness.machine(Machine(num_cores=16, memory_gib=128.0, gpus=gpus)) == "16 cores, 2 x NVIDIA H200"


@without_gpu
def test_without_a_gpu_one_line_is_said_and_nothing_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results.jsonl")
    command.main()
    said = " ".join(capsys.readouterr().out.split())
    assert (
        said == f"{', '.join(command.GROUPS['gpu'])}: this machine has no GPU; --quick tries the machinery on one core"
    )
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.timeout(300)
@without_gpu
def test_quickly_the_whole_machinery_runs_on_one_core():
    figures = gpu_gpt2.measure(is_quick=True)
    (figure,) = figures
    assert figure.num >= 2
    assert "losses" in figure.note and "LOSSES" not in figure.note
    assert "one core" in figure.note
    assert json.loads(json.dumps(harness.line("gpu-gpt2", figures, 1.0, is_quick=True)))["figures"][0]["value"] > 0
