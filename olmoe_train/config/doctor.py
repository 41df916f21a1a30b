"""Options of `olmoe doctor`."""

from dataclasses import dataclass

from olmoe_train.config.train import TrainConfig


@dataclass(frozen=True)
class DoctorConfig(TrainConfig):
    """Check the machines of a training run before it starts: versions, GPUs, disk, shared files, network.

    It accepts every key of `olmoe train`, and checks what that run would need. Run it as `olmoe doctor
    --nproc RANKS`, under torchrun as the training itself, or as `olmoe doctor` on one rank.
    """

    out: str | None = None
    """JSON file to write, with all results; null: none."""
    bandwidth_seconds: float = 15.0
    """Longest time for measuring the bandwidths of all-reduce, all-gather and all-to-all, in seconds; 0: they
    are not measured, and the links between hosts are not either."""
