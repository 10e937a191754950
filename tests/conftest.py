# SPDX-License-Identifier: BSD-3-Clause
"""What every test file shares: a fixed seed per test and hypothesis without deadlines."""

import os
import zlib
from collections import defaultdict
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


# A row of the ISA table that is the virtual GPU, see tests/ptxvm: seconds for what takes a GPU
# microseconds.
ON_VIRTUAL_GPU = os.environ.get("RING_ATTENTION_CPU", "").startswith("ptx-")

# Where the tests marked `isa` or `vm` put their tensors: `make gpu` says cuda.
DEVICE = torch.device(os.environ.get("RING_ATTENTION_TEST_DEVICE", "cpu"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-parameter",
        action="store_true",
        help="on the virtual GPU run the full matrix, not each value of each parameter once",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run again for every instruction set of the machine")
    config.addinivalue_line("markers", "vm: of the ring, run on the virtual GPU and on a GPU too")
    config.addinivalue_line("markers", "gpu: of a real GPU")
    if DEVICE.type != "cpu":
        torch.set_default_device(DEVICE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the virtual GPU no test is left out, but the matrix of its parameters is thinned.

    Of each test so many are kept that every value of every parameter is run. float64 always goes,
    on any GPU: CUDA has no kernels for it.
    """
    if not ON_VIRTUAL_GPU and DEVICE.type == "cpu":
        return
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        assert isinstance(item, pytest.Function)
        if torch.float64 not in parameters(item).values():
            tests[item.nodeid.split("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for matrix in tests.values():
        every = config.getoption("--every-parameter") or not ON_VIRTUAL_GPU
        kept.update(matrix if every else each_value_once(matrix))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def parameters(item: pytest.Function) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def each_value_once(matrix: list[pytest.Function]) -> list[pytest.Function]:
    """Greedily, in an order that mixes the values but is the same every time."""
    missing = {(name, repr(value)) for item in matrix for name, value in parameters(item).items()}
    kept = []
    order = sorted(matrix, key=lambda item: zlib.crc32(item.nodeid.encode()))
    while order:
        best = max(order, key=lambda item: len(missing & values(item)))
        if kept and not missing & values(best):
            break
        missing -= values(best)
        kept.append(best)
        order.remove(best)
    return kept


def values(item: pytest.Function) -> set[tuple[str, str]]:
    return {(name, repr(value)) for name, value in parameters(item).items()}


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
