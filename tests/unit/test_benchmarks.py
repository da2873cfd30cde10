"""The benchmarks' own arithmetic: pairs, medians, verdicts, and the line that is kept."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as `python -m tests.benchmarks` finds itself

from tests.benchmarks import __main__ as command
from tests.benchmarks import harness
from tests.benchmarks.harness import Figure, middle_half, paired
from tests.benchmarks.running import Tail


def test_a_ratio_is_of_pairs_not_of_medians():
    figure = paired("x", [1.0, 10.0, 3.0], [1.0, 100.0, 1.0], target=1.0)
    assert figure.value == 1.0  # of 1, 0.1 and 3; the medians' ratio would be 3
    assert figure.num == 3
    assert (figure.low, figure.high) == (0.1, 3.0)


def test_the_middle_half_leaves_out_a_stray_measurement():
    assert middle_half([1.0, 2.0, 3.0, 4.0, 1000.0]) == (2.0, 4.0)
    assert middle_half([5.0]) == (5.0, 5.0)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0, 2.0], [1.0])])
def test_a_measurement_without_its_pair_is_refused(ours, theirs):
    with pytest.raises(ValueError, match="x: "):
        paired("x", ours, theirs, target=1.0)


def test_a_target_is_reached_or_missed():
    assert Figure("x", 1.05, 1.05).is_reached
    assert not Figure("x", 1.051, 1.05).is_reached
    assert Figure("x", 100, 100, target_is_most=False).is_reached
    assert not Figure("x", 99, 100, target_is_most=False).is_reached


def test_a_line_says_what_was_measured_on_what(tmp_path):
    figures = [paired("a : b", [1.0, 1.2], [2.0, 2.0], 0.5, "a note")]
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        harness.keep(path, harness.line("step", figures, 3.4, is_quick=False))
    first, second = (json.loads(text) for text in path.read_text().splitlines())
    assert first["figures"] == second["figures"]
    assert first["benchmark"] == "step"
    assert "core" in first["machine"]
    assert "python" in first["versions"]
    (row,) = first["figures"]
    assert row["value"] == 0.55
    assert row["target"] == 0.5
    assert row["is_reached"] is False
    assert row["note"] == "1.1 s : 2 s; a note"


def test_the_table_names_target_and_verdict():
    from rich.console import Console

    console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(harness.table("step", [Figure("a : b", 0.9, 1.02), Figure("c : d", 1.1, 1.02)]))
    text = console.export_text()
    assert "≤ 1.02" in text
    assert "reached" in text
    assert "MISSED" in text
    console.file.close()


def test_every_name_leads_to_a_module_that_measures():
    for module in command.BENCHMARKS.values():
        source = (Path(harness.__file__).parent / f"{module}.py").read_text()
        assert "def measure(*, is_quick: bool) -> list[Figure]:" in source


def test_shipped_jobs_can_be_planned(tmp_path):
    from dtrain.spec import load

    for file in harness.JOBS.glob("*.yaml"):
        assert load.load_job(file).name == f"bench-{file.stem}"


def test_a_tail_goes_on_where_it_was(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 1}\n')
    tail = Tail(path)
    assert tail.find(lambda line: line["step"] == 2, 1.0) == {"step": 2}
    assert tail.find(lambda line: line["step"] == 1, 1.0) == {"step": 1}
    with pytest.raises(TimeoutError):
        tail.find(lambda line: line["step"] == 2, 0.05)
