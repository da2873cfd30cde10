"""From the command to the first completed step, over `torchrun` on an equivalent script.

A round: the script alone; a submit that finds nothing running; a submit that finds the cluster warm; all down again.
"""

from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import Workplace, rival_config, torchrun, workplace

WARM_TARGET, COLD_TARGET = 0.3, 1.2
JOB = ("small", "train.steps=20", "train.log_every_steps=1")


def measure(*, is_quick: bool) -> list[Figure]:
    script, cold, warm = [], [], []
    with workplace() as place:
        config = rival_config(place.plan(*JOB))
        _submit(place)  # the data are prepared, files are in memory
        for number in range(1 if is_quick else 5):
            place.down()
            rival = torchrun(place.folder / f"startup-{number}.jsonl", config)
            try:
                step = rival.await_step(lambda line: line["rank"] == 0)
                script.append(step["time"] - rival.started)
                rival.process.wait(60)
            finally:
                rival.end()
            cold.append(_submit(place))
            warm.append(_submit(place))
    return [
        paired("warm submit : torchrun", warm, script, WARM_TARGET),
        paired("cold submit : torchrun", cold, script, COLD_TARGET, "cold: no Ray head, no zygote, no driver"),
    ]


def _submit(place: Workplace) -> float:
    """Seconds to the first completed step; returns when the cluster is at rest again."""
    submitted = place.submit(*JOB)
    step = submitted.await_step(lambda line: True)
    submitted.wait()
    place.settle()
    return float(step["time"]) - submitted.started
