"""The training example over 1 and 4 processes. Against: one process."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_video.py"


def losses(group, how, wrap, parts, steps):
    """The example's losses, with so many ranks for each sample."""
    specification = importlib.util.spec_from_file_location("train_video", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    ranks = dist.get_world_size(group)
    context = group
    if parts < ranks:
        mesh = DeviceMesh("cpu", torch.arange(ranks).reshape(-1, parts), mesh_dim_names=("d", "c"))
        context = mesh.get_group("c")
    return example.train(how, wrap, steps, group, context, torch.device("cpu"))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["tokens", "heads"])
def test_training_is_that_of_one_process(ranks, how, wrap):
    (alone,) = ranks.run(1, losses, how="heads", wrap="ddp", parts=1, steps=3)
    for of_rank in ranks.run(4, losses, how=how, wrap=wrap, parts=4, steps=3):
        assert of_rank == pytest.approx(alone, rel=1e-4)


def test_two_samples_on_two_ranks_each(ranks):
    by_tokens, by_heads = (
        ranks.run(4, losses, how=how, wrap="ddp", parts=2, steps=2) for how in ("tokens", "heads")
    )
    for of_rank in (*by_tokens, *by_heads):
        assert of_rank == pytest.approx(by_tokens[0], rel=1e-4)
    (alone,) = ranks.run(1, losses, how="heads", wrap="ddp", parts=1, steps=1)
    assert by_tokens[0][0] != pytest.approx(alone[0], rel=1e-2)
