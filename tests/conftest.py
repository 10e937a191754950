# SPDX-License-Identifier: BSD-3-Clause
"""What every test file shares: a fixed seed per test and hypothesis without deadlines."""

import hypothesis
import pytest
import torch

# Test machines are shared and builds run beside them: time is bounded by pytest-timeout alone.
# Derandomised, so that a run in CI says something about the commit and not about the day.
hypothesis.settings.register_profile("ring_attention", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ring_attention")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
