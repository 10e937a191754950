# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention over a sequence that no process holds: torchrun --nproc-per-node 2 THIS_FILE"""

import torch
import torch.distributed as dist

from ring_attention import Zigzag, attention

dist.init_process_group("gloo")
group = dist.group.WORLD
layout = Zigzag(5_003, group.size())  # which token is on which rank: any length, no padding

torch.manual_seed(0)  # here every rank makes the whole sequence, to compare
q, k, v = torch.randn(3, 1, 8, layout.length, 64)
shards = [layout.shard(x, group, dim=2) for x in (q, k, v)]
out = layout.unshard(attention(*shards, group=group, layout=layout), group, dim=2)

alone = attention(q, k, v)  # the same in one process
print(f"rank {group.rank()}: {list(shards[0].shape)}, difference {(out - alone).abs().max():.1e}")
dist.destroy_process_group()
