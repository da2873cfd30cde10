"""Hand-written data-parallel training for torchrun: ddp.py CONFIG.json."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from tests.benchmarks.rivals.plain import Log, Trainer


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # torchrun's own store keeps the addresses of the ranks that are gone: after a restart gloo would often try those,
    # time and again. A careful user gives each restart names of its own.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    names = dist.PrefixStore(f"restart-{restart}", store)
    dist.init_process_group("gloo", store=names, rank=rank, world_size=world)
    trainer = Trainer(config, rank, world)
    path = Path(config["checkpoint"]) if config["checkpoint"] else None
    start = trainer.restore(torch.load(path, weights_only=True)) if path and path.exists() else 0
    log = Log(config["log"], rank=rank, restart=restart)
    for number in range(start, config["steps"]):
        loss = trainer.step(number)
        log.write(step=number + 1, loss=loss)
        if path and rank == 0:
            half = path.with_suffix(".half")
            torch.save(trainer.state(number + 1), half)
            half.replace(path)
    dist.barrier()
    os._exit(0)


main()
