"""Layouts and plans, without processes: what each rank computes, holds and sends. Against: the
mask itself, and promises of balance."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flex_block_attn import BlockMask, create_block_mask
from flex_block_attn.distributed import ContextPlan, DynamicPlan, Layout
from flex_block_attn.distributed.balance import assign, balance, lasts, level
from flex_block_attn.distributed.cut import mask_of_heads, whole_blocks
from flex_block_attn.distributed.steps import steps_of

CPU = torch.device("cpu")


def ssta(heads=24, chosen=32, near=True):
    """As SSTA's masks of 121 frames of 720p: a window of 3 x 3 x 3 tiles of 6 x 8 x 8 tokens, for
    each head the tiles that random scores choose, text that sees and is seen by all."""
    tiles = 6, 6, 10
    count = 360
    window = BlockMask.sta(tiles, (3, 3, 3), tile_tokens=384, text_tokens=6 * 384)
    scores = torch.randn(heads, count, count)
    if near:
        places = torch.cartesian_prod(*map(torch.arange, tiles)).float()
        scores -= torch.cdist(places, places)
    blocks = window.blocks.repeat(1, heads, 1, 1)
    choice = torch.zeros_like(scores, dtype=torch.bool)
    choice.scatter_(2, scores.topk(chosen, dim=2).indices, True)
    blocks[0, :, :count, :count] |= choice
    return BlockMask(blocks, window.q_len, window.kv_len, 384, 384)


# --- balance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_ssta_is_balanced(ranks, near):
    report = ContextPlan(ssta(near=near), ranks).report(heads=24, head_dim=128)
    assert report.balance >= 0.95
    counts = [rank.q_blocks for rank in report.ranks]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_causal_is_balanced(ranks):
    """Neighbours would not be: the longest rows are dealt out first."""
    plan = ContextPlan(BlockMask.causal(20480, 20480, 128, 128), ranks)
    assert balance(plan.shares().loads) >= 0.95


def test_without_shared_rows_text_would_not_be_balanced():
    mask = ssta(heads=1)
    layout = Layout.balanced(mask, 64, shared_rows=())
    assert balance(ContextPlan(mask, layout=layout).shares().loads) < 0.95


def test_neighbours_stay_together_where_that_is_balanced():
    mask = BlockMask.sliding_window(64 * 40, 64 * 40, 64, 64, left=64, right=64)
    owners = Layout.balanced(mask, 4).q_owners
    assert torch.equal(owners, torch.arange(4).repeat_interleave(10))
    assert ContextPlan(mask, 4).shares().needs.sum() == 6


def test_shared_blocks_are_spread():
    """All ranks want their keys: one owner would send to all."""
    layout = Layout.balanced(ssta(heads=1), 3)
    assert layout.shared.nonzero().flatten().tolist() == list(range(360, 366))
    assert layout.q_owners[360:].tolist() == [0, 0, 1, 1, 2, 2]


def test_level_gives_pieces_to_their_holders():
    holders = torch.tensor([[True, True, False], [False, True, True]])
    owners = level(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 2.0, 1.0]), holders)
    assert owners.tolist() == [0, 1, 1]


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_stretches_are_divided_evenly(data):
    ranks = data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, 40))
    costs = torch.tensor(
        data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count)), dtype=torch.double
    )
    spread = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    owners = assign(costs, spread, ranks)
    counts = owners.bincount(minlength=ranks)
    assert len(counts) == ranks and counts.max() - counts.min() <= 1
    assert owners[-1] == ranks - 1


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_token_has_one_rank(ranks):
    layout = Layout.even(333, 333, 32, 48, ranks=ranks, shared_rows=[2, 10])
    tokens = [layout.q_tokens(rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(tokens).sort().values, torch.arange(333))
    x = torch.randn(2, 333, 5)
    for rank in range(ranks):
        assert torch.equal(tokens[rank], layout.kv_tokens(rank))
        assert torch.equal(layout.shard(x, rank, dim=1), x[:, tokens[rank]])
        assert layout.count(rank) == len(tokens[rank])


def test_other_keys_than_queries_are_divided_apart():
    layout = Layout.even(100, 333, 32, 48, ranks=3)
    tokens = [layout.kv_tokens(rank) for rank in range(3)]
    assert torch.equal(torch.cat(tokens), torch.arange(333))
    assert layout.shard(torch.arange(333), 2, dim=0, keys=True)[-1] == 332


# --- plans ---------------------------------------------------------------------------------------


def computed(plan, rank, kv_heads, backward=False):
    """How often a rank computes each block, by its masks; and how often it has each column, bool
    (heads, columns)."""
    layout = plan.layout
    own = plan.of_rank(rank, CPU, kv_heads)
    own = own.backward if backward else own
    long = own.rows.blocks[layout.shared[layout.q_owners == rank]] if own.pieces else None
    heads = plan.blocks.shape[1]
    times = torch.zeros(plan.blocks.shape, dtype=torch.int)
    has = torch.zeros(heads, len(layout.kv_owners), dtype=torch.int)
    size, last = layout.kv_block_size, len(layout.kv_owners) - 1
    local = layout.own_columns(rank, CPU), layout.count(rank, keys=True), own.local
    steps = [(moves.step.columns, moves.step.tokens, mask) for moves, mask in own.steps()]
    for columns, tokens, mask in [local, *steps]:
        columns = columns.repeat_interleave(heads // len(columns), dim=0)
        for head in range(heads):
            some = columns[head] >= 0
            has[head, columns[head][some]] += 1
            # A short block is the last one, in the place of as many tokens.
            lengths = [
                (layout.kv_len - column * layout.kv_block_size) if column == last else size
                for column in columns[head].tolist()
            ]
            if not lengths:
                assert tokens == 0
                continue
            assert all(n == size for n in lengths[:-1])
            assert tokens == (columns.shape[1] - 1) * size + lengths[-1] or (columns[head][-1] < 0)
            if mask is not None:
                assert mask.kv_len == tokens
                cells = mask.blocks[:, head].int()
                assert not cells[..., ~some].any()
                rows = own.rows.blocks
                more = cells.shape[1] - len(rows)
                if more:
                    # Pieces of long rows come before all rows.
                    assert long is not None
                    rows = torch.cat([*[long] * (more // len(long)), rows])
                for row, cell in zip(rows, cells.unbind(1), strict=True):
                    times[:, head, row, columns[head][some]] += cell[:, some]
    return times, has


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_ranks_compute_each_block_once(data):
    ranks = data.draw(st.integers(1, 6), label="ranks")
    q_block, kv_block = data.draw(st.sampled_from([(16, 16), (16, 48), (32, 16)]), label="blocks")
    q_len = data.draw(st.integers(1, 300), label="q_len")
    kv_len = q_len if data.draw(st.booleans()) else data.draw(st.integers(1, 300), label="kv_len")
    shape = data.draw(st.sampled_from([(1, 1), (2, 3)]))
    q_blocks, kv_blocks = -(-q_len // q_block), -(-kv_len // kv_block)
    density = data.draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(*shape, q_blocks, kv_blocks, generator=generator) < density
    mask = BlockMask(blocks, q_len, kv_len, q_block, kv_block)
    shared = data.draw(st.one_of(st.none(), st.lists(st.integers(0, q_blocks - 1), max_size=3)))
    layout = Layout.balanced(mask, ranks, shared_rows=shared)
    chunks = data.draw(st.integers(1, 3))
    for plan in (
        ContextPlan(mask, layout=layout, chunks=chunks),
        DynamicPlan(mask.blocks, layout, chunks=chunks),
        DynamicPlan(mask.blocks, layout, chunks=chunks, exchange="all"),
    ):
        for kv_heads in {1, shape[1]}:
            for backward in (False, True):
                total = torch.zeros(blocks.shape, dtype=torch.int)
                for rank in range(ranks):
                    times, has = computed(plan, rank, kv_heads, backward)
                    total += times
                    assert has.max() <= 1
                assert torch.equal(total, blocks.int())


def test_what_one_sends_the_other_receives():
    mask = ssta(heads=2)
    plan = ContextPlan(mask, 5, chunks=3)
    of_rank = [steps_of(plan.shares().needs, plan.layout, rank, 3) for rank in range(5)]
    for steps in zip(*of_rank, strict=True):
        for taker, giver in ((a, b) for a in range(5) for b in range(5)):
            assert steps[taker].receive[giver] == steps[giver].send[taker]
            assert taker != giver or not steps[taker].receive[giver]


def test_a_rank_receives_what_its_rows_keep_and_no_more():
    blocks = torch.eye(8, dtype=torch.bool)
    blocks[0, 5] = True
    layout = Layout.even(128, 128, 16, 16, ranks=2)
    plan = ContextPlan(BlockMask(blocks, 128, 128, 16, 16), layout=layout, chunks=1)
    first, second = (plan.of_rank(rank, CPU, 1).steps()[0][0] for rank in (0, 1))
    assert first.step.columns.tolist() == [[5]] and not second.step.tokens
    assert second.step.send == [16, 0] and second.tokens.tolist() == list(range(16, 32))


def test_two_ranks_that_want_nearly_all_keys_send_all():
    """They then need not be picked out; in parts, or between more ranks, they still are."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(2, 16, 16, generator=generator) < 0.05
    for density, wanted in ((0.0, False), (0.5, True)):
        mask = BlockMask(
            blocks | (torch.rand(2, 16, 16, generator=generator) < density), 256, 256, 16, 16
        )
        layout = Layout.even(256, 256, 16, 16, ranks=2)
        plan = ContextPlan(mask, layout=layout)
        (((moves, _)),) = plan.of_rank(0, CPU, 2).steps()
        assert moves.step.is_whole == wanted
        report = plan.report(heads=2, head_dim=64)
        assert (report.bytes_moved == report.ring_bytes) == wanted
        if wanted:
            assert moves.step.send == [0, 128] and moves.step.receive == [0, 128]
        parts = ContextPlan(mask, layout=layout, chunks=2).of_rank(0, CPU, 2).steps()
        assert not any(moves.step.is_whole for moves, _ in parts)


def without_end(mask):
    """The mask without the last tokens, whose rows in pieces were no whole blocks."""
    return BlockMask(mask.blocks, mask.q_len - 100, mask.kv_len - 100, 384, 384)


def test_two_ranks_that_send_all_share_no_rows():
    """Of one head, a row of text takes as long as all else with the keys of the other: it is
    computed in pieces, or shared."""
    plan = ContextPlan(ssta(), 2)
    for lines in (24, 1):
        shares = plan.shares(24, lines)
        assert shares.cuts == (lines == 1) and not shares.layout.shared.any()
        assert balance(shares.loads) >= 0.99
    short = ContextPlan(without_end(ssta(heads=1)), 2).shares(1, 1)
    assert not short.cuts and short.layout.shared.sum() == 6
    report = plan.report(heads=24, head_dim=128)
    assert report.bytes_moved == report.ring_bytes
    # Sums over the batch of heads and batches are what counts.
    assert not ContextPlan(ssta(heads=1), 2).shares(1, 24).layout.shared.any()
    # A rank with a row of text more than the other would have more to do.
    mask = ssta(heads=1)
    odd = BlockMask(mask.blocks[:, :, 1:, 1:], 365 * 384, 365 * 384, 384, 384)
    some = Layout.balanced(odd, 2, shared_rows=range(360, 365))
    assert ContextPlan(odd, layout=some).shares(1, 24).layout.shared.any()
    even = ContextPlan(odd, layout=Layout.balanced(odd, 2, shared_rows=range(359, 365)))
    assert not even.shares(1, 24).layout.shared.any()


def test_shared_rows_are_not_the_longest_with_keys_of_others():
    """They are computed with one's own keys by as much more as other rows."""
    plan = ContextPlan(without_end(ssta(heads=1)), 2)
    for rank in range(2):
        of_rank = plan.of_rank(rank, CPU, 1)
        assert of_rank.pieces is None
        ((_, step),) = of_rank.steps()
        for mask in (of_rank.local, step):
            rows = mask.blocks.sum(dim=3)
            assert lasts(rows, 384, 1) <= 1.02 * 3 * rows.sum().item() / 132


def test_pieces_of_rows_are_not_the_longest():
    """Each block of a long row is in one of its pieces, and these are as few as do."""
    mask = ssta(heads=1)
    plan = ContextPlan(mask, 2)
    for rank in range(2):
        of_rank = plan.of_rank(rank, CPU, 1)
        ((moves, step),) = of_rank.steps()
        mine = plan.layout.q_owners == rank
        own = plan.layout.own_columns(rank, CPU)[0]
        for part, columns, count in ((of_rank.local, own, 2), (step, moves.columns[0], 4)):
            rows = part.blocks.sum(dim=3)
            assert lasts(rows, 384, 1) == 3 * rows.sum().item() / 132
            # Three rows of text are this rank's.
            pieces, whole = part.blocks[0, 0].split([3 * (count - 1), 183])
            long = torch.cat((pieces, whole[180:])).unflatten(0, (count, 3))
            assert long.sum(dim=0).eq(1).all() and long.sum(dim=2).max() <= -(-183 // count)
            assert torch.equal(whole[:180], mask.blocks[0, 0][mine][:180][:, columns])
            assert part.q_len == part.blocks.shape[2] * 384
        assert of_rank.pieces.most == 4 and of_rank.backward.pieces is None


def test_a_backward_pass_of_one_head_waits_for_all_keys():
    """All rows see the keys of text: they would take longer than all else, twice."""
    mask = ssta(heads=1)
    plan = ContextPlan(mask, 2)
    for rank in range(2):
        of_rank = plan.of_rank(rank, CPU, 1).backward
        columns = of_rank.together.blocks.sum(dim=2)
        assert lasts(columns, 384, 1) <= 1.02 * 3 * columns.sum().item() / 132
        parts = (of_rank.local, of_rank.steps()[0][1])
        assert sum(lasts(x.blocks.sum(dim=2), 384, 1) for x in parts) > 1.5 * lasts(columns, 384, 1)
        assert plan.of_rank(rank, CPU, 1, 24).together is None


def test_two_ranks_send_many_keys_as_they_lie_if_they_compute_meanwhile():
    """To pick out those that are wanted, a third, would take longer."""
    sta = BlockMask.sta((6, 6, 10), (3, 3, 3), tile_tokens=384, text_tokens=6 * 384)
    assert ContextPlan(sta, 2).of_rank(0, CPU, 24, 24).steps()[0][0].step.is_whole
    small = BlockMask.sta((6, 6, 10), (3, 3, 3), tile_tokens=16, text_tokens=6 * 16)
    assert not ContextPlan(small, 2).of_rank(0, CPU, 24, 24).steps()[0][0].step.is_whole
    window = BlockMask.sliding_window(122880, 122880, 384, 384, left=12288, right=12288)
    assert not ContextPlan(window, 2).of_rank(0, CPU, 24, 24).steps()[0][0].step.is_whole


def test_nothing_is_exchanged_where_nothing_is_wanted():
    mask = BlockMask(torch.eye(8, dtype=torch.bool), 128, 128, 16, 16)
    assert ContextPlan(mask, 4).of_rank(0, CPU, 1).steps() == []


def test_plans_are_made_once():
    mask = ssta(heads=2)
    plan = ContextPlan(mask, 2)
    assert plan.of_rank(1, CPU, 2) is plan.of_rank(1, CPU, 2)
    assert plan.of_heads(range(0, 1)) is plan.of_heads(range(0, 1))
    assert plan.of_heads(range(0, 2)) is plan


# --- reports -------------------------------------------------------------------------------------


def test_report_of_a_dense_mask_is_a_ring():
    report = ContextPlan(BlockMask.full(1000, 1000, 16, 16), 4).report(
        heads=6, kv_heads=2, head_dim=64
    )
    assert report.bytes_moved == report.ring_bytes == 3 * 1000 * 2 * 2 * 64 * 2
    assert sum(rank.blocks for rank in report.ranks) == 63 * 63
    assert "100.0% of a ring's" in str(report)


def test_heads_that_want_other_keys_are_sent_them_alone():
    """Head 0 looks at the block before, head 1 at the one after."""
    blocks = torch.stack([torch.eye(8).roll(shift, dims=1) for shift in (-1, 1)]).bool()
    layout = Layout.even(128, 128, 16, 16, ranks=2)
    plan = ContextPlan(BlockMask(blocks, 128, 128, 16, 16), layout=layout, chunks=1)
    first = plan.of_rank(0, CPU, 2).steps()[0][0].step
    assert first.columns.tolist() == [[7], [4]] and first.receive == [0, 32]
    # A key head that both share: both blocks, for both.
    together = plan.of_rank(0, CPU, 1).steps()[0][0].step
    assert together.columns.tolist() == [[4, 7]] and together.receive == [0, 32]
    one, two = (plan.report(heads=2, kv_heads=n, head_dim=16) for n in (1, 2))
    assert one.ranks[0].received == 2 and two.ranks[0].received == 1


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_comes_has_gone(ranks):
    report = ContextPlan(ssta(heads=2), ranks).report(heads=2, head_dim=128)
    assert sum(rank.bytes_in for rank in report.ranks) == sum(
        rank.bytes_out for rank in report.ranks
    )
    assert (report.bytes_moved == 0) == (ranks == 1)
    assert len(str(report).splitlines()) == ranks + 2


def printed(*arguments):
    """What `python -m benchmark.distributed` prints."""
    command = [sys.executable, "-m", "benchmark.distributed", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def simulated(*arguments):
    """Lines of its table of plans, as cells."""
    table = printed("--simulate", *arguments).splitlines()[1:]
    return [re.split(r" {2,}", line) for line in table]


def test_simulation_prints_a_line_for_each_division():
    lines = simulated("--small", "--ranks", "2", "4")
    assert [line[2] for line in lines if line[0] == "STA"] == ["2 x 1", "4 x 1", "2 x 2"]
    assert {line[0] for line in lines} >= {"SSTA, near tiles", "dense, 1 head"}


def test_simulated_videos_are_balanced():
    """At their size, by any division of 8 and of 64 ranks; what comes to a rank is no more than in
    a ring, but for rows of text that all share."""
    cases = ["SSTA, near tiles", "SSTA, any tiles", "SSTA, 1 head"]
    lines = simulated(*(x for case in cases for x in ("--case", case)), "--ranks", "8", "64")
    assert {(line[0], line[1]) for line in lines} == {(c, r) for c in cases for r in ("8", "64")}
    for line in lines:
        assert float(line[3]) >= 0.95
        assert float(line[-1].rstrip("%")) <= 103


def test_divisions_are_compared_with_one_process():
    """As on several GPUs, in small."""
    case = "SSTA, near tiles"
    lines = printed("--small", "--rounds", "1", "--turn", "1", "--case", case).splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cell[:2] for cell in cells] == [
        [case, by] for by in ("tokens", "tokens, new mask", "heads")
    ]
    assert all(float(cell[6]) < 1e-5 and float(cell[3]) > 0 for cell in cells)


# --- errors --------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    mask = BlockMask.full(100, 100, 16, 16)
    layout = Layout.even(100, 100, 16, 16, ranks=2)
    seven = [0] * 6 + [1]
    per_head = BlockMask(torch.ones(3, 7, 7).bool(), 100, 100, 16, 16)
    for kind, text, call in (
        (TypeError, "either ranks or layout", lambda: ContextPlan(mask)),
        (TypeError, "either ranks or layout", lambda: ContextPlan(mask, 2, layout=layout)),
        (TypeError, "mask must be a BlockMask, got Tensor", lambda: ContextPlan(mask.blocks, 2)),
        (ValueError, "chunks must be positive", lambda: ContextPlan(mask, 2, chunks=0)),
        (ValueError, "ranks must be positive", lambda: Layout.balanced(mask, 0)),
        (
            ValueError,
            "but the layout",
            lambda: ContextPlan(BlockMask.full(64, 64, 16, 16), layout=layout),
        ),
        (
            ValueError,
            "q_owners must be 7 ranks",
            lambda: Layout([0], seven, 100, 100, 16, 16, ranks=2),
        ),
        (
            ValueError,
            "kv_owners has rank 2, but there are 2 ranks",
            lambda: Layout(seven, [2] * 7, 100, 100, 16, 16, ranks=2),
        ),
        (
            ValueError,
            "q_owners must give the last block to the last rank, 1, because it has 4 tokens",
            lambda: Layout([0] * 7, seven, 100, 100, 16, 16, ranks=2),
        ),
        (
            ValueError,
            "shared_rows has 7, but there are 7 query blocks",
            lambda: Layout.even(100, 100, 16, 16, ranks=2, shared_rows=[7]),
        ),
        (
            ValueError,
            "q_block_size must be positive",
            lambda: Layout.even(100, 100, 0, 16, ranks=2),
        ),
        (
            ValueError,
            "kv_heads is 2, which does not divide the mask's 3 heads",
            lambda: ContextPlan(per_head, 2).report(heads=3, kv_heads=2, head_dim=16),
        ),
        (ValueError, "x has 99 tokens", lambda: layout.shard(torch.zeros(99), 0, dim=0)),
        (
            ValueError,
            "blocks has (6, 7) blocks, but the layout (7, 7)",
            lambda: DynamicPlan(mask.blocks[:, :, 1:], layout),
        ),
        (
            ValueError,
            'exchange must be "needed" or "all", got \'none\'',
            lambda: DynamicPlan(mask.blocks, layout, exchange="none"),
        ),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value)


def test_masks_within_blocks_are_refused():
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 256, 256)
    with pytest.raises(NotImplementedError, match="chooses tokens within blocks"):
        whole_blocks(mask)
    with pytest.raises(NotImplementedError, match="ulysses_attention"):
        ContextPlan(mask, ranks=2)


def test_masks_within_blocks_are_divided_by_heads():
    width = torch.tensor([10, 50, 200, 0])
    mask = create_block_mask(
        lambda b, h, q, kv: (q - kv).abs() <= width[h], None, 4, 200, 200, BLOCK_SIZE=32
    )
    part = mask_of_heads(mask, range(1, 3))
    assert torch.equal(part.to_dense(), mask.to_dense()[:, 1:3])
    assert mask_of_heads(mask, range(1, 3)) is part
    assert mask_of_heads(mask, range(4)) is mask
