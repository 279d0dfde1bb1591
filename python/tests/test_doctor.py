"""``python -m flex_block_attn doctor``: its words for machines of all kinds."""

import subprocess
import sys

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
}


def test_a_machine_with_everything_asks_for_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_CACHE_PATH", str(tmp_path / "kernels"))
    text = doctor.describe(MACHINE, "13.0", True)
    assert "->" not in text
    assert "16 threads; products by avx512 (float32) and avx512-bf16 (bfloat16)" in text
    assert "NVIDIA H100 80GB HBM3, 79 GiB, 132 multiprocessors, driver for CUDA 13.0" in text
    assert f"{tmp_path / 'kernels'} (the driver's)" in text
    assert "CUDA tensors: our kernels" in text


@pytest.mark.parametrize(
    ("change", "torch_cuda", "sees", "words"),
    [
        ({"gpu_problem": "no driver", "gpus": []}, None, False, "release 530 or"),
        ({"gpus": [H100 | {"problem": "too old"}]}, "13.0", True, "-> not used: too old"),
        ({}, None, False, "torch cannot use it (it was built without CUDA)"),
        ({}, "13.0", False, "torch cannot use it (see torch.cuda.init())"),
    ],
)
def test_what_is_missing_is_said_with_what_helps(change, torch_cuda, sees, words):
    assert words in doctor.describe(MACHINE | change, torch_cuda, sees)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flex_block_attn", *arguments], capture_output=True, text=True
    )


def test_a_cache_that_keeps_nothing_is_said(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CUDA_CACHE_PATH", str(blocked / "kernels"))
    text = doctor.describe(MACHINE, "13.0", True)
    assert "-> set CUDA_CACHE_PATH to a folder that can be written to" in text
    monkeypatch.setenv("CUDA_CACHE_DISABLE", "1")
    assert "-> unset CUDA_CACHE_DISABLE" in doctor.describe(MACHINE, "13.0", True)


def test_this_machine():
    result = run("doctor")
    assert result.returncode == 0, result.stderr
    assert "GPU" in result.stdout and "CPU" in result.stdout


def test_a_missing_command_shows_what_there_is():
    result = run()
    assert result.returncode == 2
    assert "doctor" in result.stderr
