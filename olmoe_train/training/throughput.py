"""Memory and speed of a run."""

import resource

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: the allocator's on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # ru_maxrss is in KiB on Linux
