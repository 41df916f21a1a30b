"""Measures the bytes of tensors on one rank, by operator, to compare with what `olmoe plan` predicts."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmoe_train.distributed.mesh import local_tensor


class LiveBytes(TorchDispatchMode):
    """Context that sees the result of every operator, also in backward, and counts the storages alive.

    Memory that an operator allocates and frees inside itself is not counted. A storage that several tensors
    share counts once, and a DTensor counts with the part that this rank holds. Each operator takes time
    proportional to the number of storages alive, so use the context for a few steps only.

        with LiveBytes(model.parameters()) as live:
            loss(model).backward()
        print(live.peak)
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """Begin with `tensors`, which are alive already and count as well."""
        super().__init__()
        self.storages: WeakSet[UntypedStorage] = WeakSet()
        """The storages that were seen and are alive."""
        self.peak = 0
        """The most bytes alive after any operator so far. Set to 0 to measure the next part of a step."""
        self._add(list(tensors))

    def now(self) -> int:
        """Bytes of the storages alive."""
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._add(result)
        self.peak = max(self.peak, self.now())
        return result

    def _add(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.storages.add(local_tensor(value).untyped_storage())


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors` on this rank, each storage counted once."""
    storages = {local_tensor(tensor).untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages)
