from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """End the process group that a test's `train` began in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
