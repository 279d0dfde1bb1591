"""What a machine has, what of it will be used, and what would help: ``python -m flex_block_attn
doctor``.

In: what the extension module and torch say. Out: text. Each line says one thing; lines that start
with an arrow say what a user can do.
"""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import _native

if TYPE_CHECKING:
    from ._native import _Report


def report() -> str:
    """The report on this machine."""
    torch_cuda = torch.version.cuda if torch.cuda.is_available() else None
    return describe(_native.doctor(), torch.version.cuda, torch_cuda is not None)


def describe(found: "_Report", torch_cuda: str | None, torch_sees_gpu: bool) -> str:
    """The report in words.

    Args:
        found: what the extension module says of the machine.
        torch_cuda: the CUDA version that torch was built for, if any.
        torch_sees_gpu: whether torch can use a GPU.
    """
    built = f"built for CUDA {torch_cuda}" if torch_cuda else "built without CUDA"
    lines = [
        f"flex-block-attn  {_native.__version__}, Python {platform.python_version()}",
        f"torch            {torch.__version__}, {built}",
        f"CPU              {found['threads']} threads; products by {found['float32']} (float32) "
        f"and {found['bf16']} (bfloat16)",
        *_gpus(found, torch_cuda, torch_sees_gpu),
        *_cache(),
        f"used             {_used(found, torch_sees_gpu)}",
    ]
    return "\n".join(lines)


def _gpus(found: "_Report", torch_cuda: str | None, torch_sees_gpu: bool) -> list[str]:
    if found["gpu_problem"] is not None:
        return [
            f"GPU              none: {found['gpu_problem']}",
            "  -> to use a Hopper GPU, make `nvidia-smi` list it: NVIDIA's driver, release 530 or",
            "     newer, must be installed, and the GPU visible to this process",
        ]
    lines = []
    for gpu in found["gpus"]:
        major, minor = gpu["driver_version"]
        lines.append(
            f"GPU              {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, driver for CUDA {major}.{minor}"
        )
        if gpu["problem"] is not None:
            lines.append(f"  -> not used: {gpu['problem']}")
    if not torch_sees_gpu:
        cause = "it was built without CUDA" if torch_cuda is None else "see torch.cuda.init()"
        lines.append(
            f"  -> torch cannot use it ({cause}): install torch for your CUDA version from "
            "pytorch.org"
        )
    return lines


def _cache() -> list[str]:
    """Where the driver keeps what it compiled (CUDA programming guide, environment variables)."""
    if os.environ.get("CUDA_CACHE_DISABLE") == "1":
        return [
            "kernel cache     off (CUDA_CACHE_DISABLE=1): each process compiles what it uses, "
            "about a second a kernel",
            "  -> unset CUDA_CACHE_DISABLE to keep compiled kernels",
        ]
    chosen = os.environ.get("CUDA_CACHE_PATH")
    folder = Path(chosen) if chosen else Path.home() / ".nv" / "ComputeCache"
    # The driver makes the folder, where it may.
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return [
            f"kernel cache     {folder} cannot be written to: each process compiles what it uses, "
            "about a second a kernel",
            "  -> set CUDA_CACHE_PATH to a folder that can be written to",
        ]
    return [f"kernel cache     {folder} (the driver's)"]


def _used(found: "_Report", torch_sees_gpu: bool) -> str:
    cpu = "CPU tensors: the CPU backend"
    if torch_sees_gpu and any(gpu["problem"] is None for gpu in found["gpus"]):
        return f"{cpu}; CUDA tensors: our kernels"
    return cpu
