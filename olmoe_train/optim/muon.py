"""Muon: updates of orthogonalized momentum, for every matrix alone, in every layout (arXiv 2502.16982).

For a matrix W [M, N] with gradient G:

    M <- mu M + G,   U = G + mu M (Nesterov) or M,   W <- W - lr (scale O + weight_decay W)

O is U with its singular values replaced by values near 1, about 0.68 to 1.2, by Newton-Schulz iterations.

Shapes: X matrices, M rows (outputs), N columns (inputs). Stacked weights [E, M, N] are E matrices, and
gate and up, [E, 2F, D], are 2 E matrices of [F, D].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from olmoe_train.config.choices import MuonScale
from olmoe_train.config.optimizer import MUON_ELEMENTS, MuonConfig
from olmoe_train.distributed.mesh import local_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of an iteration a X + b (X X^T) X + c (X X^T)^2 X."""
SMALLEST_NORM = 1e-7
"""Matrices with a smaller norm are not scaled up to norm 1: their update is smaller, and that of 0 is 0."""


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """Data type of the iterations: bf16 on a GPU, as in the reference implementations, because products of
    matrices are the cost, and the result needs few digits. fp32 on a CPU, where bf16 is not faster, and where
    layouts then agree to 1e-5."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(update_XMN: Tensor, steps: int) -> Tensor:
    """Replace the singular values of each matrix by values near 1.

    Args:
        update_XMN: Matrices in the data type of the iterations.
        steps: Number of iterations.

    Returns:
        Matrices of the same shape and data type.
    """
    a, b, c = COEFFICIENTS
    tall = update_XMN.shape[-2] > update_XMN.shape[-1]
    x = update_XMN.mT if tall else update_XMN  # X X^T is then as small as it can be
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update_scale(rows: int, columns: int, scale: MuonScale) -> float:
    """Factor of the orthogonalized update of a matrix, whose entries have root mean square
    1 / sqrt(max(rows, columns))."""
    if scale is MuonScale.match_rms:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns)


Cut = tuple[DeviceMesh, Shard]
"""The ranks that share each matrix, and how [E, M, N] is divided among them."""


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape that are updated at once."""

    parts: list[tuple[Tensor, Tensor, Tensor]]
    """This rank's weights, gradients and momentum, each [E, M, N] as the layout cuts it."""
    rows: int
    """M, of the whole weight."""
    columns: int
    """N, of the whole weight."""
    matrices_per_row: int
    """Matrices along M."""
    cut: Cut | None
    """None: each rank holds whole matrices."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose `rule` is muon, and fused AdamW for the other groups.

    Where matrices are whole on a rank, the rank updates them without communication. Where FSDP2 has cut them,
    the ranks that share them exchange their parts, so that each rank orthogonalizes some matrices, whole.
    """

    _step_supports_amp_scaling = True
    """As torch's fused optimizers, `step` reads `found_inf` on the device: where it is not 0, nothing changes
    (skip_step.py)."""

    def __init__(self, groups: list[dict[str, Any]], cfg: MuonConfig) -> None:
        """groups: from roles.parameter_groups, with this cfg."""
        self.cfg = cfg
        super().__init__(groups, {"lr": cfg.lr, "weight_decay": cfg.weight_decay})
        others = [group for group in self.param_groups if group["rule"] != cfg.name]
        self._adamw = (
            torch.optim.AdamW(others, cfg.lr, cfg.adamw_betas, cfg.adamw_eps, fused=True) if others else None
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over the ranks that share a matrix."""
        found: Tensor | None = getattr(self, "found_inf", None)
        skip = None if found is None else found.bool()
        for group in self.param_groups:
            if group["rule"] == self.cfg.name:
                for batch in self._batches(group):
                    self._update(batch, group["lr"], group["weight_decay"], skip)
        if self._adamw is not None:
            # One state for both, because a checkpoint saves and fills that of this object.
            self._adamw.state = self.state
            self._adamw.found_inf = found  # type: ignore[attr-defined]
            self._adamw.step()

    def _batches(self, group: dict[str, Any]) -> Iterator[Batch]:
        """The matrices of a group, a bounded number of elements per rank at a time; alike on every rank."""
        open_batches: dict[tuple[Any, ...], Batch] = {}
        for parameter, per_row in zip(group["params"], group["matrices_per_row"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            tensors = [
                local_tensor(t.detach()) for t in (parameter, parameter.grad, state["momentum_buffer"])
            ]
            rows, columns = parameter.shape[-2:]
            cut = _cut(parameter)
            at_once = max(1, MUON_ELEMENTS // (rows * columns)) * (1 if cut is None else cut[0].size())
            if parameter.ndim == 3:
                for part in zip(*(tensor.split(at_once) for tensor in tensors), strict=True):
                    yield Batch([part], rows, columns, per_row, cut)
                continue
            weight, gradient, momentum = (tensor.unsqueeze(0) for tensor in tensors)
            key = (rows, columns, per_row, cut)
            batch = open_batches.setdefault(key, Batch([], rows, columns, per_row, cut))
            batch.parts.append((weight, gradient, momentum))
            if len(batch.parts) == at_once:
                yield open_batches.pop(key)
        yield from open_batches.values()

    def _update(self, batch: Batch, lr: float, weight_decay: float, skip: Tensor | None) -> None:
        """Update the matrices of a batch. Collective over the ranks that share them."""
        direction = self._direction(self._momentum(batch, skip), batch)
        rows, columns = batch.rows // batch.matrices_per_row, batch.columns
        factor = lr * update_scale(rows, columns, self.cfg.scale)
        sizes = [len(weight) for weight, _, _ in batch.parts]
        for (weight, _, _), of_weight in zip(batch.parts, direction.split(sizes), strict=True):
            shrunk = weight * (1 - lr * weight_decay)
            _store(weight, shrunk.sub_(of_weight, alpha=factor), skip)

    def _momentum(self, batch: Batch, skip: Tensor | None) -> Tensor:
        """Add the gradients to the momentum. Returns what is to be orthogonalized, [E, M, N] as it is cut."""
        updates = []
        for _, gradient, momentum in batch.parts:
            total = momentum * self.cfg.momentum + gradient
            update = gradient + total * self.cfg.momentum if self.cfg.nesterov else total
            updates.append(update.to(newton_schulz_dtype(update.device)))
            _store(momentum, total, skip)
        return updates[0] if len(updates) == 1 else torch.cat(updates)

    def _direction(self, update: Tensor, batch: Batch) -> Tensor:
        """Orthogonalize each matrix of this rank's part of the update, [E, M, N] as the layout cuts it."""
        shape = torch.Size((len(update), batch.rows, batch.columns))
        if batch.cut is not None:
            mesh, placement = batch.cut
            update = _redistribute(update, shape, mesh, placement, Shard(0))
        matrices = update.reshape(
            len(update) * batch.matrices_per_row, batch.rows // batch.matrices_per_row, batch.columns
        )
        direction = orthogonalize(matrices, self.cfg.ns_steps).reshape(update.shape)
        if batch.cut is not None:
            direction = _redistribute(direction, shape, mesh, Shard(0), placement)
        return direction


def _store(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Set `target` to `value`, unless `skip` (bool scalar on the device) is true."""
    target.copy_(value if skip is None else torch.where(skip, target, value))


def _cut(parameter: Tensor) -> Cut | None:
    """How the layout cuts the matrices of a parameter; None where a rank holds whole matrices."""
    if not isinstance(parameter, DTensor):
        return None
    mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names
    assert names is not None
    cuts = []
    for index, placement in enumerate(parameter.placements):
        assert isinstance(placement, Shard | Replicate), placement
        if isinstance(placement, Shard) and mesh.size(index) > 1:
            dim = placement.dim + 3 - parameter.ndim
            if dim > 0:
                cuts.append((mesh[names[index]] if mesh.ndim > 1 else mesh, Shard(dim)))
    assert len(cuts) <= 1, "no layout cuts matrices twice"
    return cuts[0] if cuts else None


def _redistribute(local: Tensor, shape: torch.Size, mesh: DeviceMesh, now: Shard, then: Shard) -> Tensor:
    """This rank's part of a tensor of `shape` that is divided over the mesh as `then`, and not as `now`."""
    stride = (shape[1] * shape[2], shape[2], 1)
    tensor = DTensor.from_local(local.contiguous(), mesh, [now], run_check=False, shape=shape, stride=stride)
    return tensor.redistribute(placements=[then]).to_local()
