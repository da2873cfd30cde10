"""What all tests on gloo ranks share."""

import pytest
from world import Ranks


@pytest.fixture(scope="session")
def ranks():
    """The process that gloo ranks are forked from (see world.py)."""
    with Ranks() as started:
        yield started
