"""Three raylets for the tests of builds and staging, started once for each file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.raylets import Raylets


@pytest.fixture(scope="module")
def shared() -> Iterator[Raylets]:
    with Raylets(3) as raylets:
        yield raylets


@pytest.fixture
def cluster(shared: Raylets) -> Raylets:
    """Three nodes; replaces those that an earlier test has killed or added."""
    while shared.num_nodes < 3:
        shared.add_node()
    while shared.num_nodes > 3:
        shared.kill_node(3)
    return shared
