# SPDX-License-Identifier: BSD-3-Clause
"""What "a group" may be, its transport in this process, and collectives over it."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .ring import LocalTransport, ProcessGroupTransport, Transport

_transports: "weakref.WeakKeyDictionary[dist.ProcessGroup, ProcessGroupTransport]" = (
    weakref.WeakKeyDictionary()
)
_local = LocalTransport()
_named: "weakref.WeakValueDictionary[str, Transport]" = weakref.WeakValueDictionary(
    {_local.name: _local}
)


def register(transport: Transport) -> None:
    """Makes a transport that is no process group findable by name, while it lives."""
    _named[transport.name] = transport


def transport_of(group: Any) -> Transport:
    """This rank's transport over a group.

    Args:
        group: None (this process only), a ProcessGroup, a DeviceMesh (one-dimensional, with a
            dimension named "cp", or with dimensions of SPLITS), or a virtual rank's group.

    Raises:
        TypeError, ValueError: anything else.
    """
    if group is None:
        return _local
    if isinstance(group, Transport):
        return group
    if isinstance(group, DeviceMesh):
        group = _group_of_mesh(group)
    if not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "ring_attention: expected group to contain this rank, got a group without it; "
                "pass each rank the group it belongs to"
            )
        raise TypeError(
            "ring_attention: expected group to be a ProcessGroup, a DeviceMesh or None, got "
            f"{type(group).__name__}; use torch.distributed.new_group or init_device_mesh"
        )
    transport = _transports.get(group)
    if transport is None:
        transport = _transports[group] = ProcessGroupTransport(group)
    return transport


# Dimensions of a DeviceMesh that share a sequence among them, outermost first.
SPLITS = (("inter", "intra", "ulysses"), ("ring", "ulysses"), ("inter", "intra"))


def _split_of(mesh: DeviceMesh) -> tuple[str, ...] | None:
    names = mesh.mesh_dim_names or ()
    return next((split for split in SPLITS if set(split) <= set(names)), None)


def degrees_of(group: Any) -> dict[str, int]:
    """What a DeviceMesh with dimensions of SPLITS says about a plan: ulysses, ranks_per_node."""
    split = _split_of(group) if isinstance(group, DeviceMesh) else None
    if split is None:
        return {}
    assert isinstance(group, DeviceMesh)
    size = {name: group[name].size() for name in split}
    degrees = {"ulysses": size.get("ulysses", 1)}
    if "intra" in size:
        degrees["ranks_per_node"] = size["intra"] * degrees["ulysses"]
    return degrees


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names or ()
    if "cp" in names:
        return mesh.get_group("cp")
    if mesh.ndim == 1:
        return mesh.get_group()
    split = _split_of(mesh)
    if split is None:
        raise ValueError(
            "ring_attention: expected group to be a one-dimensional DeviceMesh or one with a "
            f'dimension "cp" or the dimensions {", ".join(map(str, SPLITS))}, got dimensions '
            f'{names or mesh.ndim}; pass mesh["name"] of the sequence dimension'
        )
    flat = mesh[split]._flatten()  # private API, the same in torch 2.11 and 2.15; kept by the mesh
    group = flat.get_group()
    if dist.get_process_group_ranks(group) != flat.mesh.tolist():
        raise ValueError(
            f"ring_attention: expected the ranks of {split} to ascend, got {flat.mesh.tolist()}; "
            "make the mesh with init_device_mesh"
        )
    return group


def transport_named(name: str) -> Transport:
    """The transport of a group given by name, as the communicating operators know it."""
    named = _named.get(name)
    if named is not None:
        return named
    return transport_of(dist.distributed_c10d._resolve_process_group(name))


def traced_name(group: Any) -> str:
    """A group's name, by what a compiler can trace."""
    if group is None:
        return _local.name
    if isinstance(group, Transport):
        return group.name
    if isinstance(group, DeviceMesh):
        group = _group_of_mesh(group)
    return group.group_name


def rank_of(group: Any) -> int:
    """This process's rank in a group; 0 for None."""
    return transport_of(group).rank


def size_of(group: Any) -> int:
    """A group's number of ranks; 1 for None."""
    return transport_of(group).size


# --- Collectives around the ring (not differentiable) ---------------------------------------------


def all_gather(x: Tensor, group: Any) -> list[Tensor]:
    """Every rank's tensor, in rank order; sizes may differ between ranks, dimensions may not.

    Args:
        x: any tensor; all ranks pass the same dtype and number of dimensions.
        group: as in `transport_of`.
    """
    transport = transport_of(group)
    x = x.detach()
    if transport.size == 1:
        return [x]
    shapes = [
        tuple(shape.tolist())
        for shape in transport.gather_equal(torch.tensor(x.shape, device=x.device))
    ]
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    # Collectives want equal sizes; the tail of a shorter rank is never read.
    padded = x.new_zeros(max(sizes))
    padded[: x.numel()] = x.reshape(-1)
    gathered = transport.gather_equal(padded)
    return [
        flat[:size].view(shape) for flat, size, shape in zip(gathered, sizes, shapes, strict=True)
    ]


def all_reduce_(x: Tensor, group: Any) -> Tensor:
    """Sums x over the ranks, in place.

    Args:
        x: a tensor of the same shape and dtype on every rank.
        group: as in `transport_of`.
    """
    transport_of(group).sum_(x)
    return x
