"""What tests on GPUs share: when they run, and tensors by the layouts that users have. In: shapes.
Out: marks, tensors. Used by ``test_cuda.py`` and ``test_cuda_masks.py``.
"""

import pytest
import torch


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"{torch.cuda.get_device_name()} is no Hopper GPU"
    return None


NEEDS_HOPPER = [
    pytest.mark.skipif(_why_not() is not None, reason=str(_why_not())),
    # torch's thread for gradients says so when a product is the first that it computes.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]


def tensor(shape, layout, dtype, generator):
    """Random numbers by one of the layouts that users have."""
    batch, heads, tokens, dim = shape
    if layout == "heads first":
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)
    if layout == "tokens first":
        x = torch.randn(batch, tokens, heads, dim, device="cuda", generator=generator).to(dtype)
        return x.transpose(1, 2)
    # One of q, k and v that were computed together.
    x = torch.randn(batch, tokens, 3, heads, dim, device="cuda", generator=generator).to(dtype)
    return x[:, :, 1].transpose(1, 2)
