"""Processes to be ranks, started once for all tests of the loss."""

import pytest

from tests.loss.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    processes = Ranks()
    yield processes
    processes.stop()
