"""Trains a small video transformer whose attention is divided between ranks.

In: nothing (options below). Out: the loss of each step, the same for every number of ranks up to
rounding. Run on two GPUs, or without any on CPUs:

    torchrun --nproc-per-node 2 examples/train_video.py --divide tokens

The model is a diffusion transformer in small: it sees a noised video and a text, and says which way
the noise lies (rectified flow). Each layer chooses its blocks anew, as SSTA does: tiles of a window
around each tile, the tiles whose mean keys are most like a tile's mean query, and the text.

A sample is divided between the ranks of a context group; different samples go to different groups.
DDP or FSDP goes around the model on all ranks, as ever: every rank has gradients of its own tokens,
which have to be summed like those of its own samples.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import gelu
from torch.nn.parallel import DistributedDataParallel

from flex_block_attn import BlockMask
from flex_block_attn.distributed import (
    DynamicPlan,
    Layout,
    context_attention,
    gather_blocks,
    ulysses_attention,
)

# Tiles of the video along (time, height, width), tokens of a tile, of the text, and numbers of a
# token.
TILES = 2, 3, 4
TILE = 2, 4, 4
TILE_TOKENS = 32
TEXT = 64
CHANNELS = 8
VIDEO = 24 * TILE_TOKENS
# Tiles that a tile chooses by likeness.
CHOSEN = 4

# (q, k, v) of this rank's tokens, video before text, to the output of the same tokens.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def choose(query_means: Tensor, key_means: Tensor, window: Tensor) -> Tensor:
    """Blocks of a layer: the window's and text's, and the most similar tiles of each tile.

    Args:
        query_means, key_means: (batch, heads, blocks, head_dim).
        window: bool (blocks, blocks).
    """
    tiles = VIDEO // TILE_TOKENS
    scores = query_means[:, :, :tiles] @ key_means[:, :, :tiles].transpose(2, 3)
    blocks = window.expand(*scores.shape[:2], -1, -1).clone()
    similar = torch.zeros_like(scores, dtype=torch.bool)
    similar.scatter_(3, scores.topk(CHOSEN, dim=3).indices, True)
    blocks[:, :, :tiles, :tiles] |= similar
    return blocks


def block_means(x: Tensor) -> Tensor:
    """Means of whole blocks of tokens, (batch, heads, blocks, head_dim), of no gradient."""
    return x.detach().unflatten(2, (-1, TILE_TOKENS)).mean(dim=3)


@dataclass
class Division:
    """How a sample lies on the ranks of a context group."""

    # This rank's tokens among all of the sample, video before text, and those of the video.
    tokens: Tensor
    video: int
    attention: Attention


def divide(how: str, group: dist.ProcessGroup | None, device: torch.device) -> Division:
    """``"tokens"``: each rank has some blocks, and is sent the keys that these want;
    ``"heads"``: each has some of the video and all of the text, and computes some heads."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    window = BlockMask.sta(TILES, (1, 3, 3), tile_tokens=TILE_TOKENS, text_tokens=TEXT)
    blocks = window.blocks[0, 0].to(device)
    sizes = window.q_len, window.kv_len, TILE_TOKENS, TILE_TOKENS
    if how == "tokens":
        # Rows of a window are alike, and text rows are found to be long, hence shared.
        layout = Layout.balanced(window, ranks)

        def by_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries = gather_blocks(block_means(q), layout, dim=2, group=group)
            keys = gather_blocks(block_means(k), layout, dim=2, keys=True, group=group)
            plan = DynamicPlan(choose(queries, keys, blocks), layout)
            return context_attention(q, k, v, plan, group=group)

        tokens = layout.q_tokens(rank)
        return Division(tokens, int((tokens < VIDEO).sum()), by_tokens)

    lengths = [len(part) for part in torch.arange(VIDEO).tensor_split(ranks)]
    own = lengths[rank]

    def mask_of(q: Tensor, k: Tensor, heads: range) -> BlockMask:
        return BlockMask(choose(block_means(q), block_means(k), blocks), *sizes)

    def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q, q_text), (k, k_text), (v, v_text) = (x.split([own, TEXT], dim=2) for x in (q, k, v))
        outs = ulysses_attention(
            q, k, v, mask_of, group=group, text=(q_text, k_text, v_text), lengths=lengths
        )
        return torch.cat(outs, dim=2)

    start = sum(lengths[:rank])
    text = torch.arange(VIDEO, VIDEO + TEXT)
    return Division(torch.cat((torch.arange(start, start + own), text)), own, by_heads)


class Layer(nn.Module):
    """Attention and two dense layers, each added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_dense = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        qkv = self.to_qkv(self.before_attention(x)).unflatten(2, (3, self.heads, -1))
        # (batch, tokens, heads, head_dim) as it lies: attention takes it without a copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        x = x + self.from_heads(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.before_dense(x))))


class VideoTransformer(nn.Module):
    """The direction of the noise in each token of the video."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 2):
        super().__init__()
        self.of_video, self.of_text = nn.Linear(CHANNELS, width), nn.Linear(CHANNELS, width)
        self.of_place, self.of_time = nn.Linear(6, width), nn.Linear(1, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, CHANNELS)

    def forward(self, video: Tensor, text: Tensor, time: Tensor, division: Division) -> Tensor:
        """
        Args:
            video, text: this rank's tokens, (batch, tokens, channels).
            time: share of noise, (batch,).
        """
        places = places_of(division.tokens[: division.video]).to(video)
        video = self.of_video(video) + self.of_place(places)
        x = torch.cat((video, self.of_text(text)), dim=1) + self.of_time(time[:, None, None])
        for layer in self.layers:
            x = layer(x, division.attention)
        return self.out(x[:, : division.video])


def places_of(tokens: Tensor) -> Tensor:
    """Sine and cosine of (time, height, width) of video tokens, which lie tile by tile."""
    tile, inside = tokens // TILE_TOKENS, tokens % TILE_TOKENS
    coordinates = []
    for axis in (2, 1, 0):
        count, size = TILES[axis], TILE[axis]
        place = (tile % count) * size + inside % size
        coordinates.append(place / (count * size))
        tile, inside = tile // count, inside // size
    angles = torch.stack(coordinates, dim=1)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sample(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A video with the text that describes it, noise, and the share of it: the same on all ranks
    that ask for the same number."""
    generator = torch.Generator().manual_seed(number)
    text = torch.randn(1, TEXT, CHANNELS, generator=generator)
    waves = places_of(torch.arange(VIDEO)) @ torch.randn(6, CHANNELS, generator=generator)
    noise = torch.randn(1, VIDEO, CHANNELS, generator=generator)
    return (waves + text.mean(dim=1)).sin()[None], text, noise, torch.rand(1, generator=generator)


def train(
    how: str,
    wrap: str,
    steps: int,
    everyone: dist.ProcessGroup | None,
    context: dist.ProcessGroup | None,
    device: torch.device,
) -> list[float]:
    """Losses of the steps, means over samples.

    Args:
        how: as of :func:`divide`.
        wrap: "ddp" or "fsdp".
        everyone: the ranks.
        context: those of them that work on one sample with this one; neighbours.
    """
    torch.manual_seed(0)
    model = VideoTransformer().to(device)
    if wrap == "ddp":
        model = DistributedDataParallel(model, process_group=everyone)
    else:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(everyone or dist.group.WORLD, device.type)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    division = divide(how, context, device)
    parts = dist.get_world_size(context)
    samples = dist.get_world_size(everyone) // parts
    of_video = division.tokens[: division.video]
    of_text = division.tokens[division.video :] - VIDEO

    losses = []
    for step in range(steps):
        number = step * samples + dist.get_rank(everyone) // parts
        video, text, noise, time = (x.to(device) for x in sample(number))
        noised = (1 - time) * video + time * noise
        # GPUs compute attention in bfloat16.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            way = model(noised[:, of_video], text[:, of_text], time, division)
        # The loss is a mean over the tokens of all ranks, of which this is the rank's part. DDP
        # and FSDP divide the sum of gradients by all ranks, but only samples are to be divided by.
        error = (way - (noise - video)[:, of_video]).square().sum() / noise.numel()
        (error * parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = error.detach() / samples
        dist.all_reduce(total, group=everyone)
        losses.append(total.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--divide", choices=("tokens", "heads"), default="tokens")
    parser.add_argument("--wrap", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--ranks-per-sample", type=int, help="all if not given")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as in: torchrun --nproc-per-node 2 " + __file__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # What is exchanged while attention has all of a GPU goes first.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", "8")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    parts = args.ranks_per_sample or ranks
    if ranks % parts:
        parser.error(f"--ranks-per-sample must divide {ranks} ranks, got {parts}")
    mesh = init_device_mesh(
        device.type, (ranks // parts, parts), mesh_dim_names=("data", "context")
    )
    losses = train(args.divide, args.wrap, args.steps, None, mesh.get_group("context"), device)
    if dist.get_rank() == 0:
        for step, loss in enumerate(losses):
            print(f"step {step:3}: loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
