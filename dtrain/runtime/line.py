"""The line between an agent and the driver: what is said over it, and what becomes of an agent whose driver is gone.

agent -> driver                                          driver -> agent
{"hello": node}                                          {"store": [host, port]}   to followers
{"store": [host, port]}   the leader's                   {"stop": who}
{"record": {...}}         changes of the run's record
{"event": {...}}          for the driver to note, where this node does not see the run's folder
{"preempted": node}       this node is about to go away
{"end": {...}}            how it all came out
"""

import contextlib
import secrets
import selectors
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

ORPHANED = "the driver is gone"


class DriverLine:
    """An agent's end: one connection; `on_lost` is called once, when the driver is found to be gone."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        node: int,
        selector: selectors.BaseSelector,
        on_lost: Callable[[], None],
    ) -> None:
        self.stop: str | None = None
        """Who wants the run to stop."""
        self.store_address: tuple[str, int] | None = None
        """Of the leader's store, for its followers."""
        self.is_lost = False
        self._node, self._selector, self._on_lost = node, selector, on_lost
        self._is_preempted = False
        self._driver: Connection | None = Client(address, authkey=secret)
        selector.register(self._driver, selectors.EVENT_READ, self._read)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Say something to the driver; nobody hears it when the driver is gone."""
        if self._driver is not None:
            try:
                self._driver.send(dict(message))
            except OSError:
                self._lose()

    def notice_preemption(self) -> None:
        """This node is about to go away; told by `tell_preemption`, since a signal may come at any time."""
        self._is_preempted = True

    def tell_preemption(self) -> None:
        """Tell the driver what was noticed since the last call, if anything was."""
        if self._is_preempted:
            self._is_preempted = False
            self.tell({"preempted": self._node})

    def _read(self) -> None:
        assert self._driver is not None
        try:
            message = self._driver.recv()
        except (EOFError, OSError):
            self._lose()
            return
        if "stop" in message:
            self.stop = message["stop"]
        if "store" in message:
            self.store_address = tuple(message["store"])

    def _lose(self) -> None:
        """Without a driver nobody holds the run's resources: put the state on storage and leave."""
        if self._driver is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(self._driver)
            self._driver = None
            self.is_lost = True
            self.stop = self.stop or ORPHANED
            self._on_lost()


class AgentLines:
    """The driver's end of them all. What agents need to know of each other is passed on here."""

    def __init__(self, host: str) -> None:
        self.secret = secrets.token_bytes(32)
        self._listener = Listener((host, 0), backlog=64, authkey=self.secret)
        self._arriving: list[Connection] = []
        self.begin()
        threading.Thread(target=self._accept, daemon=True).start()

    def begin(self) -> None:
        """Forget the agents there were: others are about to start."""
        self._agents: dict[int, Connection] = {}
        """By node; below zero while they have not said theirs."""
        self._store: list[Any] | None = None
        self._stop: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.address
        return str(host), int(port)

    @property
    def has_leader(self) -> bool:
        return 0 in self._agents

    @property
    def is_any_open(self) -> bool:
        return bool(self._agents)

    @property
    def is_one_arriving(self) -> bool:
        return bool(self._arriving)

    @property
    def is_stop_told(self) -> bool:
        return self._stop is not None

    def heard(self, sentinels: Sequence[int], seconds: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """What agents say, each with its node; waits until one does, a sentinel turns readable, or time is up."""
        for agent in self._arriving[:]:
            self._arriving.remove(agent)
            self._agents[-id(agent)] = agent
        ready = wait([*self._agents.values(), *sentinels], timeout=seconds)
        for key, agent in list(self._agents.items()):
            if agent not in ready:
                continue
            try:
                message = agent.recv()
            except (EOFError, OSError):
                self._agents.pop(key, None)
                continue
            if "hello" in message:
                self._agents.pop(key, None)
                self._welcome(message["hello"], agent)
            elif "store" in message:
                self._store = list(message["store"])
                for node, follower in self._agents.items():
                    if node > 0:
                        _say(follower, {"store": self._store})
            else:
                yield key, message

    def tell_to_stop(self, who: str) -> None:
        """All that are there, and those that arrive later."""
        self._stop = who
        for agent in self._agents.values():
            _say(agent, {"stop": who})

    def close(self) -> None:
        self._listener.close()

    def _welcome(self, node: int, agent: Connection) -> None:
        self._agents[node] = agent
        if self._store is not None and node != 0:
            _say(agent, {"store": self._store})
        if self._stop is not None:
            _say(agent, {"stop": self._stop})

    def _accept(self) -> None:
        while True:
            try:
                self._arriving.append(self._listener.accept())
            except OSError:
                return  # closed
            except Exception as error:  # somebody without the secret
                print(f"a connection was refused: {error}", file=sys.stderr)


def _say(agent: Connection, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # one that is gone is seen when it is listened to
        agent.send(message)
