"""An agent's line to the driver: what is said over it, and what becomes of an agent whose driver is gone.

agent -> driver                                          driver -> agent
{"hello": node}                                          {"store": [host, port]}   to followers
{"store": [host, port]}   the leader's                   {"stop": who}
{"record": {...}}         changes of the run's record
{"event": {...}}          for the driver to note, where this node does not see the run's folder
{"preempted": node}       this node is about to go away
{"end": {...}}            how it all came out
"""

import contextlib
import selectors
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection
from typing import Any

ORPHANED = "the driver is gone"


class DriverLine:
    """One connection; `on_lost` is called once, when the driver is found to be gone."""

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
