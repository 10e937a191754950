# SPDX-License-Identifier: BSD-3-Clause
"""What is copied to a device once. Meta tensors stand for those of a GPU: see test_cuda.py."""

import torch
from torch import Tensor

from ring_attention.device_copy import DeviceCopies
from ring_attention.layout import Contiguous, Striped

META = torch.device("meta")


def test_copies_are_made_once_and_the_oldest_goes_unless_a_graph_reads_it() -> None:
    copies, made = DeviceCopies(most=2), []

    def get(key: str) -> Tensor:
        def make() -> Tensor:
            made.append(key)
            return torch.zeros(3)

        return copies.get(key, META, make)

    assert get("a").device == META and get("a") is get("a")
    assert made == ["a"]
    for key in "bac":  # of which b is the oldest in the end
        get(key)
    assert [key for key, _ in copies.kept] == ["a", "c"]
    copies.kept["a", META].captured = True
    for key in "defg":
        get(key)
    assert [key for key, _ in copies.kept] == ["a", "f", "g"]  # a is not counted
    assert made == [*"abcdefg"]


def test_positions_on_a_device_belong_to_layout_and_rank() -> None:
    layout = Striped(40, 3, block=4)
    assert torch.equal(layout.positions_on(1, torch.device("cpu")), layout.positions(1))
    on_meta = [x.positions_on(r, META) for x in (layout, Contiguous(40, 3)) for r in range(3)]
    assert len({id(x) for x in on_meta}) == 6
    assert layout.positions_on(1, META) is on_meta[1]
    assert on_meta[1].shape == layout.positions(1).shape
    assert [len(x) for x in layout.order_on(META)] == [*layout.sizes]
    order = layout.order_on(torch.device("cpu"))
    assert all(torch.equal(x, layout.positions(r)) for r, x in enumerate(order))
