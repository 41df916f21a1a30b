"""Speed and memory of a run: tokens per second, model FLOPs utilization, peak memory."""

import resource
import time

import torch
import torch.distributed as dist

from olmoe_train.config.choices import Precision
from olmoe_train.model.adapters.spec import AdapterSpec
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.planning.flops import peak_flops, train_flops_per_token


class Throughput:
    """Measures the time of training steps. Every rank keeps its own; all see the same token counts."""

    def __init__(
        self,
        config: OlmoeConfig,
        sequence_length: int,
        precision: Precision,
        device: torch.device,
        tokens: int,
        adapter: AdapterSpec | None = None,
    ) -> None:
        """tokens: trained on before this process started. adapter: the one that is trained, if any."""
        self._device = device
        self._flops_per_token = train_flops_per_token(config, sequence_length, adapter).total
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._peak_flops = peak_flops(name, precision.dtype)
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Begin a new measurement. Callbacks restart it after validation and saves, which are no training."""
        self._started, self._tokens = time.perf_counter(), tokens

    def measure(self, tokens: int) -> dict[str, float | None]:
        """perf/* since the last restart, and a restart. tokens: trained on so far.

        perf/mfu is a share of all ranks' dense peak; None where the device's peak is not known.
        """
        speed = (tokens - self._tokens) / (time.perf_counter() - self._started)
        self.restart(tokens)
        mfu = None
        if self._peak_flops is not None:
            mfu = speed * self._flops_per_token / (self._peak_flops * dist.get_world_size())
        return {
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/peak_memory_gib": peak_memory_gib(self._device),
        }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: the allocator's on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # ru_maxrss is in KiB on Linux
