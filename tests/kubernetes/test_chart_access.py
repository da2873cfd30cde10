"""Who may do what: each right that the chart gives is here with what it is for, and there are no others."""

import pytest
from chart import EVERYTHING, MINIMAL, RUNS, VALUE_SETS, Object, Values, named, objects, of_kind

Rights = dict[str, dict[str, str]]

FOLLOW: Rights = {
    "rayjobs.ray.io": {
        "get": "where a run stands",
        "list": "dtrain ps",
        "watch": "dtrain submit follows without asking again and again",
    },
    "rayclusters.ray.io": {
        "get": "why a run waits: its Ray cluster's conditions",
        "list": "dtrain cluster status",
        "watch": "the phases of a start, as they happen",
    },
    "pods": {
        "get": "kubectl describe pod, which messages advise",
        "list": "the pods of a run, and what is done once they are gone",
        "watch": "pulling, starting, running, as it happens",
    },
    "pods/log": {"get": "dtrain logs"},
    "events": {
        "list": "why nothing happens: scheduler, quota, image, autoscaler",
        "watch": "the same, as it happens",
    },
    "configmaps dtrain-cluster": {"get": "the cluster file, and no other"},
}
SUBMIT: Rights = {
    "rayjobs.ray.io": {"create": "dtrain submit", "delete": "dtrain stop, and a resume of what ended"},
    "networkpolicies.networking.k8s.io": {
        "create": "what lets a run's pods talk to each other; goes with its RayJob",
        "get": "whether one that is there already is this run's, after a lost answer",
    },
    "persistentvolumeclaims": {"get": "the doctor: is the volume of runs there"},
    "serviceaccounts": {"get": "the doctor: is the account of runs there"},
    "resourcequotas": {"list": "the doctor, and why a pod was refused"},
}
STANDING: Rights = {
    "rayclusters.ray.io": {
        "create": "dtrain cluster up",
        "patch": "dtrain cluster scale",
        "delete": "dtrain cluster down",
    }
}
DASHBOARD: Rights = {
    "services/proxy": {"get": "the dashboard through the API server"},
    "pods/portforward": {"create": "kubectl port-forward to a dashboard"},
}
KUEUE: Rights = {
    "localqueues.kueue.x-k8s.io": {"get": "the doctor: does the queue let runs in"},
    "workloads.kueue.x-k8s.io": {"list": "why a run waits in the queue"},
}
CLUSTER: Rights = {
    "nodes": {"list": "the doctor: which shapes of node there are, and what is free"},
    "priorityclasses.scheduling.k8s.io": {"get": "the doctor: is that of runs there"},
    "runtimeclasses.node.k8s.io": {"get": "the doctor: is that of GPU pods there"},
}
SUPERVISE: Rights = {
    "rayjobs.ray.io": {
        "get": "whether a run that seems lost is",
        "delete": "a RayJob that ended cannot begin again",
        "list": "whether the old one is gone",
        "watch": "the same, without asking again and again",
        "create": "the run, again",
    },
    "rayclusters.ray.io": {"get": "whether its head is still there"},
    "networkpolicies.networking.k8s.io": {
        "create": "what the run brings",
        "get": "whether one that is there already is this run's, after a lost answer",
    },
    "pods": {"list": "whether anything of the run is left"},
    "events": {"list": "why it ended, for the record"},
}


def _sum(*parts: Rights) -> dict[str, set[str]]:
    together: dict[str, set[str]] = {}
    for part in parts:
        for resource, verbs in part.items():
            together.setdefault(resource, set()).update(verbs)
    return together


def rights(role: Object) -> dict[str, set[str]]:
    given: dict[str, set[str]] = {}
    for rule in role["rules"]:
        assert set(rule) - {"resourceNames"} == {"apiGroups", "resources", "verbs"}
        only = "".join(f" {one}" for one in rule.get("resourceNames", []))
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                name = (f"{resource}.{group}" if group else resource) + only
                assert name not in given, f"{name} is there twice: one rule hides in another"
                given[name] = set(rule["verbs"])
    return given


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, _sum(FOLLOW, SUBMIT, STANDING)),
        ({"access": {"standingClusters": False}}, _sum(FOLLOW, SUBMIT)),
        (EVERYTHING, _sum(FOLLOW, SUBMIT, STANDING, DASHBOARD, KUEUE)),
    ],
    ids=["defaults", "no_standing_clusters", "everything"],
)
def test_submitters_have_what_their_commands_need_and_no_more(values: Values, expected: dict[str, set[str]]) -> None:
    assert rights(named(objects(values), "ClusterRole", "dtrain-user")) == expected


@pytest.mark.parametrize(("values", "more"), [({}, {}), (EVERYTHING, KUEUE)], ids=["defaults", "everything"])
def test_viewers_look_and_touch_nothing(values: Values, more: Rights) -> None:
    given = rights(named(objects(values), "ClusterRole", "dtrain-viewer"))
    assert given == _sum(FOLLOW, more)
    assert set().union(*given.values()) <= {"get", "list", "watch"}


def test_of_the_whole_cluster_submitters_see_what_the_doctor_looks_at() -> None:
    assert rights(named(objects({}), "ClusterRole", "dtrain-user-cluster")) == _sum(CLUSTER)
    without = objects({"access": {"cluster": False, "submitters": {"groups": ["ml"]}}})
    assert of_kind(without, "ClusterRoleBinding") == []


@pytest.mark.parametrize("namespace", ["team-a", "team-b"])
def test_a_supervisor_may_replace_runs_of_its_own_namespace(namespace: str) -> None:
    everything = objects(EVERYTHING)
    assert rights(named(everything, "Role", "dtrain-supervisor", namespace)) == _sum(SUPERVISE)
    binding = named(everything, "RoleBinding", "dtrain-supervisor", namespace)
    assert binding["roleRef"]["kind"] == "Role"
    assert [(one["kind"], one["namespace"], one["name"]) for one in binding["subjects"]] == [
        ("ServiceAccount", namespace, "dtrain-supervisor")
    ]


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_no_wildcards_no_secrets_no_ways_up(values: Values) -> None:
    for role in of_kind(objects(values), "Role", "ClusterRole"):
        for resource, verbs in rights(role).items():
            assert "*" not in resource and not verbs & {"*", "escalate", "bind", "impersonate", "deletecollection"}
            assert not resource.startswith(("secrets", "roles", "rolebindings", "pods/exec"))
            assert resource != "configmaps", "all of a namespace's; one by its name is another matter"
            assert resource != "serviceaccounts" or verbs == {"get"}
            if resource == "pods":
                assert verbs <= {"get", "list", "watch"}, "a pod of one's own could be anything; a RayJob is checked"


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_pods_of_runs_are_bound_to_nothing(values: Values) -> None:
    for binding in of_kind(objects(values), "RoleBinding", "ClusterRoleBinding"):
        assert not {one["name"] for one in binding["subjects"]} & {"dtrain-run", "dtrain-autoscaling", "default"}


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_roles_that_are_bound_are_there(values: Values) -> None:
    all_objects = objects(values)
    for binding in of_kind(all_objects, "RoleBinding", "ClusterRoleBinding"):
        role = binding["roleRef"]
        namespace = binding["metadata"]["namespace"] if role["kind"] == "Role" else None
        assert named(all_objects, role["kind"], role["name"], namespace)


def test_people_are_bound_in_each_namespace_of_runs_and_nowhere_else() -> None:
    everything = objects(EVERYTHING)
    for role, subjects in (
        ("user", [("User", "ann@acme.example"), ("Group", "ml"), ("ServiceAccount", "submit")]),
        ("viewer", [("Group", "everybody")]),
    ):
        bindings = [one for one in of_kind(everything, "RoleBinding") if one["metadata"]["name"] == f"dtrain-{role}"]
        assert [one["metadata"]["namespace"] for one in bindings] == ["team-a", "team-b"]
        for one in bindings:
            assert [(of["kind"], of["name"]) for of in one["subjects"]] == subjects
    wide = [one for one in of_kind(everything, "ClusterRoleBinding") if "doctor" not in one["metadata"]["name"]]
    assert [one["roleRef"]["name"] for one in wide] == ["dtrain-user-cluster"]


def test_nobody_is_let_in_who_was_not_named() -> None:
    people = [
        one
        for one in of_kind(objects({}), "RoleBinding")
        if one["metadata"]["name"] in ("dtrain-user", "dtrain-viewer")
    ]
    assert people == []
    minimal = objects(MINIMAL)
    assert of_kind(minimal, "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding") == []


def test_a_second_name_is_bound_to_its_own_roles() -> None:
    lab = objects({"name": "lab", "access": {"submitters": {"groups": ["ml"]}}}, name="lab", namespace="lab")
    assert named(lab, "RoleBinding", "lab-user", RUNS)["roleRef"]["name"] == "lab-user"
