"""The same training under Ray Train's TorchTrainer, which restarts lost workers: ray_train.py CONFIG.json."""

import json
import sys
import tempfile
from pathlib import Path

import ray
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config: dict) -> None:
    import torch

    from tests.benchmarks.rivals.plain import Log, Trainer

    context = train.get_context()
    rank = context.get_world_rank()
    trainer = Trainer(config, rank, context.get_world_size())
    start = 0
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            start = trainer.restore(torch.load(Path(folder) / "state.pt", weights_only=True))
    log = Log(config["log"], rank=rank)
    for number in range(start, config["steps"]):
        loss = trainer.step(number)
        log.write(step=number + 1, loss=loss)
        with tempfile.TemporaryDirectory() as folder:
            made = None
            if rank == 0:
                torch.save(trainer.state(number + 1), Path(folder) / "state.pt")
                made = Checkpoint.from_directory(folder)
            train.report({"loss": loss}, checkpoint=made)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    ray.init(address="local", num_cpus=4, log_to_driver=True, _temp_dir=config["ray_folder"])
    TorchTrainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            storage_path=config["storage"],
            failure_config=FailureConfig(max_failures=1000),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


main()
