import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty comes filled with NaN (floats) or the largest value (integers)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
