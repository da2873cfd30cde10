"""The dashboard asks for what Ray exports and what the chart's PodMonitor adds, and for nothing else."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chart import CHART, EVERYTHING, named, objects, of_kind

DASHBOARD: dict[str, Any] = json.loads((CHART / "dashboards" / "runs.json").read_text())
PANELS = [one for one in DASHBOARD["panels"] if one["type"] != "row"]
ADDED = {"namespace", "run", "node_type", "ray_io_cluster"}
"""Labels that come from the pods, not from Ray."""


@pytest.fixture(scope="module")
def of_ray() -> str:
    """Where Ray itself says what it exports: the gauges of its node agent, and the panels of its own dashboards."""
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        pytest.skip("Ray is not installed: whether the dashboard's metrics exist was not looked at")
    modules = Path(spec.origin).parent / "dashboard" / "modules"
    agent = (modules / "reporter" / "reporter_agent.py").read_text()
    gauges = re.findall(r'^    "(\w+)": Gauge\(', agent, flags=re.MULTILINE)
    assert len(gauges) > 30
    panels = (modules / "metrics" / "dashboards" / "default_dashboard_panels.py").read_text()
    return " ".join(f"ray_{one}" for one in gauges) + panels


def _asked(panel: dict[str, Any]) -> list[str]:
    return [one["expr"] for one in panel["targets"]]


def test_every_metric_is_one_that_ray_exports(of_ray: str) -> None:
    metrics = {one for panel in PANELS for text in _asked(panel) for one in re.findall(r"\bray_\w+(?=\{)", text)}
    assert len(metrics) > 12
    assert {one for one in metrics if not re.search(rf"\b{one}\b", of_ray)} == set()


def test_every_label_is_rays_or_the_pod_monitors(of_ray: str) -> None:
    (monitor,) = of_kind(objects(EVERYTHING), "PodMonitor")
    relabelled = {one["targetLabel"] for one in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]}
    assert relabelled == ADDED - {"namespace"}
    for panel in PANELS:
        for text in _asked(panel):
            used = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", text))
            used |= {one.strip() for group in re.findall(r"by \(([^)]*)\)", text) for one in group.split(",")}
            for label in used - ADDED:
                assert re.search(rf'\b{label}(=|!|\)|,|")', of_ray), f"{panel['title']}: {label}"


def test_expressions_are_whole_and_follow_the_choice_of_run() -> None:
    for panel in PANELS:
        for text in _asked(panel):
            for left, right in ("()", "{}", "[]"):
                assert text.count(left) == text.count(right), text
            assert text.count("{") == text.count('run=~"$run"') == text.count('namespace=~"$namespace"'), text


def test_choices_are_defined() -> None:
    assert [one["name"] for one in DASHBOARD["templating"]["list"]] == ["datasource", "namespace", "run"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS)))
    assert used == {"datasource", "namespace", "run"}


def test_panels_say_what_they_show_and_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert all(panel["description"].endswith(".") for panel in PANELS)
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)


def test_the_dashboard_arrives_as_it_is_written() -> None:
    made = named(objects(EVERYTHING), "ConfigMap", "dtrain-dashboard", "monitoring")
    assert json.loads(made["data"]["dtrain-runs.json"]) == DASHBOARD
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_prometheus_selects_the_monitor_by_the_labels_it_was_given() -> None:
    (monitor,) = of_kind(objects(EVERYTHING), "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert of_kind(objects({}), "PodMonitor") == []
