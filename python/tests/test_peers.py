"""Peers of the benchmark that need a GPU, by stand-ins that read the lists they are given. Against:
the mask of tokens that the case's blocks stand for."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from reference import token_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmark import peers
from benchmark.measure import measure
from benchmark.problem import Problem
from benchmark.suites import SUITES

CPU = torch.device("cpu")
SMOKE = {case.name: case for case in SUITES["smoke"].cases}


def kept_by(counts, columns, size, tokens):
    """The pairs of tokens that lists keep."""
    blocks = torch.zeros(*columns.shape[:3], columns.shape[3], dtype=torch.bool)
    used = torch.arange(columns.shape[3]) < counts[..., None]
    blocks.scatter_(3, columns.long(), used)
    return token_mask(blocks, tokens, tokens, size, size)


def install(monkeypatch, name, **contents):
    """A module of this name, and the packages that it is in."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(contents)


def flash4_stand_in(monkeypatch):
    def flash_attn_func(q, k, v, block_sparse_tensors=None, block_sparse_tensors_bwd=None):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        tokens = q.shape[1]
        keep = kept_by(
            block_sparse_tensors.full_block_cnt, block_sparse_tensors.full_block_idx, 128, tokens
        )
        assert (block_sparse_tensors_bwd is not None) == q.requires_grad
        if block_sparse_tensors_bwd is not None:
            lists = block_sparse_tensors_bwd
            backward = kept_by(lists.full_block_cnt, lists.full_block_idx, 128, tokens)
            assert torch.equal(backward.mT, keep)
        assert not block_sparse_tensors.mask_block_cnt.any()
        return scaled_dot_product_attention(*heads_first, attn_mask=keep).transpose(1, 2)

    install(monkeypatch, "flash_attn.cute.interface", flash_attn_func=flash_attn_func)
    lists = {"BlockSparseTensorsTorch": SimpleNamespace}
    monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", SimpleNamespace(**lists))


def vsa_stand_in(monkeypatch):
    def attend(q, k, v, columns, counts, sizes):
        assert columns.shape[:2] == q.shape[:2] and columns.is_contiguous()
        assert counts.dtype == columns.dtype == sizes.dtype == torch.int32
        assert sizes.sum() == k.shape[2]
        keep = kept_by(counts, columns, 64, q.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=keep), None

    install(
        monkeypatch,
        "fastvideo_kernel.block_sparse_attn",
        block_sparse_attn_from_indices=attend,
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["window s200", "random s200", "ssta 3x6x8 h2"])
@pytest.mark.parametrize("name, stand_in", [("FA4", flash4_stand_in), ("VSA", vsa_stand_in)])
def test_lists_of_peers_keep_the_blocks_of_the_mask(name, stand_in, kind, backward, monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(peers, "_only_on_gpus", lambda problem: None)
    case = SMOKE[kind]
    if case.video:
        tiles = replace(case.video, tile=(2, 8, 8), text=128)
        case = replace(case, video=tiles, q_block=128, kv_block=128)
        case = replace(case, q_len=tiles.padded, kv_len=tiles.padded)
    else:
        case = replace(case, q_len=256, kv_len=256, q_block=128, kv_block=128)
    measured = measure(Problem.of(case, CPU), [name], backward, 1, 0.1)
    assert list(measured.figures) == ["ours", name], measured


def test_blocks_that_a_peer_has_not_are_said(monkeypatch):
    flash4_stand_in(monkeypatch)
    monkeypatch.setattr(peers, "_only_on_gpus", lambda problem: None)
    measured = measure(Problem.of(SMOKE["random s200"], CPU), ["FA4"], False, 1, 0.1)
    assert measured.absent == {"FA4": "has blocks of 128, here they are of 64 x 64"}
