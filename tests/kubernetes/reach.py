"""Who may open a connection to whom, by the rules of NetworkPolicy: what no policy selects is open, what one selects is
closed but for what some policy that selects it allows, and both ends must agree.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A pod, or an address outside of the cluster when it has no namespace."""

    namespace: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "10.1.0.1"
    is_host: bool = False
    """In the network of its machine: policies that name pods do not see it."""


def outside(address: str) -> Peer:
    return Peer(address=address)


def reaches(policies: list[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    return _allows(policies, source, target, "Egress", port, protocol) and _allows(
        policies, target, source, "Ingress", port, protocol
    )


def _allows(policies: list[Object], pod: Peer, other: Peer, direction: str, port: int, protocol: str) -> bool:
    """Whether the policies that select a pod let it send to, or hear from, another."""
    chosen = [one for one in policies if _selects(one, pod) and direction in _types(one)]
    if not chosen:
        return True
    side = {"Egress": ("egress", "to"), "Ingress": ("ingress", "from")}[direction]
    return any(
        _is_peer(rule.get(side[1]), other, policy) and _is_port(rule.get("ports"), port, protocol)
        for policy in chosen
        for rule in policy["spec"].get(side[0], [])
    )


def _types(policy: Object) -> list[str]:
    spec = policy["spec"]
    return spec.get("policyTypes") or ["Ingress"] + (["Egress"] if "egress" in spec else [])


def _selects(policy: Object, pod: Peer) -> bool:
    return pod.namespace == policy["metadata"]["namespace"] and _matches(policy["spec"]["podSelector"], pod.labels)


def _is_peer(peers: list[Object] | None, other: Peer, policy: Object) -> bool:
    if not peers:
        return True  # a rule without peers is about everybody
    return any(_is_one(peer, other, policy["metadata"]["namespace"]) for peer in peers)


def _is_one(peer: Object, other: Peer, namespace: str) -> bool:
    if block := peer.get("ipBlock"):
        address = ip_address(other.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(one) for one in block.get("except", [])
        )
    if other.namespace is None or other.is_host:
        return False
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != namespace:
        return False
    return _matches(peer.get("podSelector", {}), other.labels)


def _is_port(ports: list[Object] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    return any(
        one.get("protocol", "TCP") == protocol
        and one.get("port", port) <= port <= one.get("endPort", one.get("port", port))
        for one in ports
    )


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        {
            "In": lambda one: labels.get(one["key"]) in one["values"],
            "NotIn": lambda one: labels.get(one["key"]) not in one["values"],
            "Exists": lambda one: one["key"] in labels,
            "DoesNotExist": lambda one: one["key"] not in labels,
        }[one["operator"]](one)
        for one in selector.get("matchExpressions", [])
    )
