"""A process group of any size in one process.

What torch's fake process group does otherwise than gloo and NCCL: a collective returns at once, as if the
other ranks had sent nothing, or the same as this one; no rank waits for another, so no deadlock shows; and a
dtype that a backend cannot reduce is not refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of a process group of `world_size` ranks, of which no other exists.

    No process group may exist before; none does afterwards.
    """
    # The import registers the backend "fake"; torch has no public module for it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "the fake ranks would replace real ones"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
