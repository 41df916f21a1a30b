"""Muon: updates of orthogonalized momentum, for every matrix alone, in every layout (arXiv 2502.16982).

For a matrix W [M, N] with gradient G:

    M <- mu M + G,   U = G + mu M (Nesterov) or M,   W <- W - lr (scale O + weight_decay W)

O is U with its singular values replaced by values near 1, about 0.68 to 1.2, by Newton-Schulz iterations.

Shapes: X matrices, M rows (outputs), N columns (inputs). Stacked weights [E, M, N] are E matrices, and
gate and up, [E, 2F, D], are 2 E matrices of [F, D].
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
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


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose `rule` is muon, and fused AdamW for the other groups.

    Where an expert's matrices are whole on a rank, the rank updates them without communication. Where FSDP2
    has cut matrices, each rank gathers them, computes the whole update, and keeps its shard of the result.
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
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["rule"] == self.cfg.name:
                for parameter, per_row in zip(group["params"], group["matrices_per_row"], strict=True):
                    self._update(parameter, per_row, group, None if skip is None else skip.bool())
        if self._adamw is not None:
            # One state for both, because a checkpoint saves and fills that of this object.
            self._adamw.state = self.state
            self._adamw.found_inf = skip  # type: ignore[attr-defined]
            self._adamw.step()

    def _update(
        self, parameter: nn.Parameter, per_row: int, group: dict[str, Any], skip: Tensor | None
    ) -> None:
        """Update the matrices of one parameter, [E, M, N] or [M, N], a bounded number at a time."""
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        tensors = [local_tensor(t.detach()) for t in (parameter, parameter.grad, state["momentum_buffer"])]
        if parameter.ndim == 2:
            tensors = [tensor.unsqueeze(0) for tensor in tensors]
        rows, columns = parameter.shape[-2:]
        cut = _cut(parameter)
        at_once = max(1, MUON_ELEMENTS // (rows * columns))
        for weight, gradient, momentum in zip(*(t.split(at_once) for t in tensors), strict=True):
            total = momentum * self.cfg.momentum + gradient
            update = gradient + total * self.cfg.momentum if self.cfg.nesterov else total
            _store(momentum, total, skip)
            update = _whole(update.to(newton_schulz_dtype(update.device)), (rows, columns), cut)
            matrices = update.reshape(len(update) * per_row, rows // per_row, columns)
            direction = orthogonalize(matrices, self.cfg.ns_steps).reshape(update.shape)
            factor = group["lr"] * update_scale(rows // per_row, columns, self.cfg.scale)
            shrunk = weight * (1 - group["lr"] * group["weight_decay"])
            _store(weight, shrunk.sub_(_shard(direction, cut), alpha=factor), skip)


def _store(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Set `target` to `value`, unless `skip` (bool scalar on the device) is true."""
    target.copy_(value if skip is None else torch.where(skip, target, value))


Cut = tuple[DeviceMesh, Shard]
"""The ranks that share each matrix, and how [E, M, N] is divided among them."""


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


def _whole(part: Tensor, matrix: tuple[int, int], cut: Cut | None) -> Tensor:
    """Gather the whole matrices [E, *matrix] from the ranks that share them. Collective."""
    if cut is None:
        return part
    mesh, placement = cut
    shape = torch.Size((len(part), *matrix))
    stride = (matrix[0] * matrix[1], matrix[1], 1)
    return DTensor.from_local(
        part, mesh, [placement], run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _shard(whole: Tensor, cut: Cut | None) -> Tensor:
    """This rank's part of whole matrices, as `_whole` takes it; without communication."""
    if cut is None:
        return whole
    mesh, placement = cut
    return (
        DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        .redistribute(placements=[placement])
        .to_local()
    )
