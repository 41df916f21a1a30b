"""Muon and NorMuon: updates of orthogonalized momentum, for every matrix alone, in every layout.

For a matrix W [M, N] with gradient G:

    M <- mu M + G,   U = G + mu M (Nesterov) or M,   W <- W - lr (scale O + weight_decay W)

O is U with its singular values replaced by values near 1, about 0.68 to 1.2, by Newton-Schulz iterations
(arXiv 2502.16982). NorMuon then divides each row of O by the root of a running mean of its squares
(arXiv 2510.05491):

    v_r <- beta2 v_r + (1 - beta2) mean over columns of O_r^2,   O_r <- O_r / (sqrt(v_r) + eps)

and its scale gives the whole matrix the root mean square 0.2, that of an update of AdamW.

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
from olmoe_train.config.optimizer import MOMENTUM, MUON_ELEMENTS, ROW_MOMENT, MuonConfig, NorMuonConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.optim.skip_step import store_unless

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of an iteration a X + b (X X^T) X + c (X X^T)^2 X."""
SMALLEST_NORM = 1e-7
"""Matrices with a smaller norm are not scaled up to norm 1: their update is smaller, and that of 0 is 0."""
ADAMW_RMS = 0.2
"""Root mean square of the update that learning rates of AdamW fit (arXiv 2502.16982)."""


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
        return ADAMW_RMS * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns)


Cut = tuple[DeviceMesh, Shard]
"""The ranks that share each matrix, and how [E, M, N] is divided among them."""


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape that are updated at once."""

    parts: list[tuple[Tensor, ...]]
    """This rank's weights, gradients and momentum, each [E, M, N] as the layout cuts it; with NorMuon also
    the means of the rows, [E, M]."""
    rows: int
    """M, of the whole weight."""
    columns: int
    """N, of the whole weight."""
    matrices_per_row: int
    """Matrices along M."""
    cut: Cut | None
    """None: each rank holds whole matrices."""

    @property
    def sizes(self) -> list[int]:
        """E of each part."""
        return [len(weight) for weight, *_ in self.parts]


class Muon(torch.optim.Optimizer):
    """Muon or NorMuon for the groups whose `rule` has this name, and fused AdamW for the other groups.

    Where matrices are whole on a rank, the rank updates them without communication. Where FSDP2 has cut them,
    the ranks that share them exchange their parts, so that each rank orthogonalizes some matrices, whole.
    """

    _step_supports_amp_scaling = True
    """As torch's fused optimizers, `step` reads `found_inf` on the device: where it is not 0, nothing changes
    (skip_step.py)."""

    def __init__(self, groups: list[dict[str, Any]], cfg: MuonConfig | NorMuonConfig) -> None:
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
            tensors = [local_tensor(t.detach()) for t in (parameter, parameter.grad, *self._state(parameter))]
            rows, columns = parameter.shape[-2:]
            cut = _cut(parameter)
            at_once = max(1, MUON_ELEMENTS // (rows * columns)) * (1 if cut is None else cut[0].size())
            if parameter.ndim == 3:
                for part in zip(*(tensor.split(at_once) for tensor in tensors), strict=True):
                    yield Batch([part], rows, columns, per_row, cut)
                continue
            key = (rows, columns, per_row, cut)
            batch = open_batches.setdefault(key, Batch([], rows, columns, per_row, cut))
            batch.parts.append(tuple(tensor.unsqueeze(0) for tensor in tensors))
            if len(batch.parts) == at_once:
                yield open_batches.pop(key)
        yield from open_batches.values()

    def _state(self, parameter: Tensor) -> list[Tensor]:
        """The state of a parameter, zeros before its first update."""
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter, requires_grad=False)
            if isinstance(self.cfg, NorMuonConfig):
                state[ROW_MOMENT] = zeros_of_rows(parameter)
        return [state[key] for key in (MOMENTUM, ROW_MOMENT) if key in state]

    def _update(self, batch: Batch, lr: float, weight_decay: float, skip: Tensor | None) -> None:
        """Update the matrices of a batch. Collective over the ranks that share them."""
        direction = self._direction(self._momentum(batch, skip), batch, skip)
        factor = lr * self._scale(batch.rows // batch.matrices_per_row, batch.columns)
        for (weight, *_), of_weight in zip(batch.parts, direction.split(batch.sizes), strict=True):
            shrunk = weight * (1 - lr * weight_decay)
            store_unless(weight, shrunk.sub_(of_weight, alpha=factor), skip)

    def _scale(self, rows: int, columns: int) -> float:
        if isinstance(self.cfg, NorMuonConfig):
            return ADAMW_RMS
        return update_scale(rows, columns, self.cfg.scale)

    def _momentum(self, batch: Batch, skip: Tensor | None) -> Tensor:
        """Add the gradients to the momentum. Returns what is to be orthogonalized, [E, M, N] as it is cut."""
        updates = []
        for _, gradient, momentum, *_ in batch.parts:
            total = momentum * self.cfg.momentum + gradient
            update = gradient + total * self.cfg.momentum if self.cfg.nesterov else total
            updates.append(update.to(newton_schulz_dtype(update.device)))
            store_unless(momentum, total, skip)
        return updates[0] if len(updates) == 1 else torch.cat(updates)

    def _direction(self, update: Tensor, batch: Batch, skip: Tensor | None) -> Tensor:
        """Orthogonalize each matrix of this rank's part of the update, [E, M, N] as the layout cuts it."""
        whole = _whole(update, batch)
        number, rows = len(whole) * batch.matrices_per_row, batch.rows // batch.matrices_per_row
        matrices = whole.reshape(number, rows, batch.columns)
        direction = orthogonalize(matrices, self.cfg.ns_steps)
        if isinstance(self.cfg, NorMuonConfig):
            direction = self._with_even_rows(direction, batch, skip, self.cfg)
        return _cut_again(direction.reshape(whole.shape), len(update), batch)

    def _with_even_rows(
        self, direction_XMN: Tensor, batch: Batch, skip: Tensor | None, cfg: NorMuonConfig
    ) -> Tensor:
        """NorMuon's division of rows, by running means, and of each matrix, by its root mean square."""
        dtype, direction_XMN = direction_XMN.dtype, direction_XMN.float()
        kept = [rows.unsqueeze(-1) for *_, rows in batch.parts]
        held = torch.cat(kept)  # [E, M, 1] as the layout cuts it
        whole = _whole(held, batch)
        mean = direction_XMN.square().mean(-1, keepdim=True).reshape(whole.shape)
        moment = cfg.beta2 * whole + (1 - cfg.beta2) * mean
        new = _cut_again(moment, len(held), batch)
        for target, value in zip(kept, new.split(batch.sizes), strict=True):
            store_unless(target, value, skip)
        even_XMN = direction_XMN / (moment.sqrt() + cfg.eps).reshape(*direction_XMN.shape[:-1], 1)
        norm = torch.linalg.matrix_norm(even_XMN, keepdim=True).clamp(min=SMALLEST_NORM)
        return even_XMN.mul_(math.sqrt(math.prod(even_XMN.shape[-2:])) / norm).to(dtype)


def zeros_of_rows(parameter: Tensor) -> Tensor:
    """Zeros, one per row of a parameter: [..., M] of [..., M, N], in its layout."""
    return torch.zeros_like(parameter.detach().select(-1, 0), memory_format=torch.contiguous_format)


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


def _whole(part: Tensor, batch: Batch) -> Tensor:
    """This rank's share of whole matrices, or of their rows, of which `part` [E, M, ...] is cut."""
    if batch.cut is None:
        return part
    mesh, placement = batch.cut
    return _redistribute(part, (len(part), batch.rows, part.shape[-1]), mesh, placement, Shard(0))


def _cut_again(whole: Tensor, number: int, batch: Batch) -> Tensor:
    """The reverse of `_whole`. number: E of the part."""
    if batch.cut is None:
        return whole
    mesh, placement = batch.cut
    return _redistribute(whole, (number, batch.rows, whole.shape[-1]), mesh, Shard(0), placement)


def _redistribute(
    local: Tensor, shape: tuple[int, int, int], mesh: DeviceMesh, now: Shard, then: Shard
) -> Tensor:
    """This rank's part of a tensor of `shape` that is divided over the mesh as `then`, and not as `now`."""
    stride = (shape[1] * shape[2], shape[2], 1)
    tensor = DTensor.from_local(
        local.contiguous(), mesh, [now], run_check=False, shape=torch.Size(shape), stride=stride
    )
    return tensor.redistribute(placements=[then]).to_local()
