"""``python -m flex_block_attn doctor``: its words for machines of all kinds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flex_block_attn import doctor

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "capability": (9, 0),
    "multiprocessors": 132,
    "memory_bytes": 85 * 10**9,
    "driver_version": (13, 0),
    "problem": None,
}
MACHINE = {
    "float32": "avx512",
    "bf16": "avx512-bf16",
    "threads": 16,
    "gpu_problem": None,
    "gpus": [H100],
    "cache_folder": Path("/cache"),
    "cache_kernels": 3,
    "cache_bytes": 3 << 20,
    "cache_problem": None,
}


def test_a_machine_with_everything_asks_for_nothing():
    text = doctor.describe(MACHINE, "13.0", True)
    assert "->" not in text
    assert "16 threads; products by avx512 (float32) and avx512-bf16 (bfloat16)" in text
    assert "NVIDIA H100 80GB HBM3, 79 GiB, 132 multiprocessors, driver for CUDA 13.0" in text
    assert "/cache: 3 compiled kernels, 3.0 MiB" in text


@pytest.mark.parametrize(
    ("change", "torch_cuda", "sees", "words"),
    [
        ({"gpu_problem": "no driver", "gpus": []}, None, False, "release 530 or"),
        ({"gpus": [H100 | {"problem": "too old"}]}, "13.0", True, "-> not used: too old"),
        ({}, None, False, "torch cannot use it (it was built without CUDA)"),
        ({}, "13.0", False, "torch cannot use it (see torch.cuda.init())"),
        ({"cache_folder": None}, "13.0", True, "-> set FLEX_BLOCK_ATTN_CACHE_DIR"),
        ({"cache_problem": "read-only"}, "13.0", True, "that can be written to"),
    ],
)
def test_what_is_missing_is_said_with_what_helps(change, torch_cuda, sees, words):
    assert words in doctor.describe(MACHINE | change, torch_cuda, sees)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flex_block_attn", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )


def test_this_machine(tmp_path: Path):
    folder = tmp_path / "kernels"
    result = run("doctor", FLEX_BLOCK_ATTN_CACHE_DIR=str(folder))
    assert result.returncode == 0, result.stderr
    assert f"{folder}: 0 compiled kernels" in result.stdout
    assert "GPU" in result.stdout and "CPU" in result.stdout
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("doctor", FLEX_BLOCK_ATTN_CACHE_DIR=str(blocked))
    assert "-> set FLEX_BLOCK_ATTN_CACHE_DIR to a folder that can be written to" in result.stdout


def test_a_missing_command_shows_what_there_is():
    result = run()
    assert result.returncode == 2
    assert "doctor" in result.stderr
