"""What several modules share: a bucket on a server that speaks S3, empty for each test."""

from collections.abc import Iterator

import pytest
from s3_server import Server, served


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as started:
        yield started


@pytest.fixture
def s3(server: Server) -> Server:
    server.clear()
    return server
