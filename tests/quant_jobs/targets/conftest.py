"""Three raylets for the tests of builds and staging, started once for each file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.raylets import Raylets


@pytest.fixture(scope="module")
def shared() -> Iterator[Raylets]:
    from support.raylets import Raylets  # not before pytest has put Ray into token mode

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
