# SPDX-License-Identifier: BSD-3-Clause
"""What every test file shares: a fixed seed per test and hypothesis without deadlines."""

import os
from collections.abc import Callable, Iterator

# Processes of one test share the machine's few cores: a thread that waits must sleep, not spin.
# Read when torch loads its OpenMP, so before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

from ranks import RankPool

# Test machines are shared and builds run beside them: time is bounded by pytest-timeout alone.
# Derandomised, so that a run in CI says something about the commit and not about the day.
hypothesis.settings.register_profile("ring_attention", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ring_attention")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run again for every instruction set of the machine")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], RankPool]]:
    """pools(P): the session's pool of P gloo processes, started when first asked for."""
    made: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in made:
            made[world_size] = RankPool(world_size)
        return made[world_size]

    yield get
    for ranks in made.values():
        ranks.close()
