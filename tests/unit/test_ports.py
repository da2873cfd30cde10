"""Ports for a Ray head: free ones, outside the range of its workers, even where the system offers only that range."""

import socket

import pytest

from dtrain.backends import local
from dtrain.errors import ClusterError


class Offering(socket.socket):
    """Where the system is asked to choose, it chooses from the workers' range."""

    next_port = 15_000

    def bind(self, address):
        host, port = address
        if port == 0:
            Offering.next_port += 1
            port = Offering.next_port
        super().bind((host, port))


def test_ports_differ_and_lie_outside_the_workers_range():
    ports = local._free_ports(7)
    assert len(set(ports)) == 7
    assert not any(10_000 <= port <= 19_999 for port in ports)


def test_a_system_that_offers_only_the_workers_range(monkeypatch):
    monkeypatch.setattr(local.socket, "socket", Offering)
    ports = local._free_ports(7)
    assert len(set(ports)) == 7
    assert min(ports) >= 20_000


def test_no_port_is_left(monkeypatch):
    class Full(socket.socket):
        def bind(self, address):
            raise OSError("Address already in use")

    monkeypatch.setattr(local.socket, "socket", Full)
    with pytest.raises(ClusterError, match="only 0 of 7 ports are free"):
        local._free_ports(7)
