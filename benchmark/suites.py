"""What is measured: suites of cases, as data. In: nothing. Out: :data:`SUITES`.

A case says shapes and a kind of mask; :mod:`.problem` makes tensors of it. Used by every program
here that times attention. To add a case is to add a line; docs/benchmarks.md says what the kinds
of masks mean.
"""

from dataclasses import dataclass
from math import prod

Triple = tuple[int, int, int]

# The lengths, and the shares of blocks, of the three suites that the reference is published with.
LENGTHS = (11520, 19200, 30720, 38400, 46080, 53760, 61440, 69120, 76800, 84480)
RATES = (0.2, 0.4, 0.6, 0.8)
# Those that are measured first, where time is short: enough of them for lines in plots.
FIRST_LENGTHS = (11520, 30720, 61440)
FIRST_RATES = (0.2, 0.6)

MASKS = ("dense", "window", "random", "causal blocks", "causal", "local", "ssta")


@dataclass(frozen=True)
class Video:
    """Tokens of a video with text behind, and how SSTA chooses tiles of it."""

    thw: Triple
    topk: int
    tile: Triple = (6, 8, 8)
    window: Triple = (3, 3, 3)
    text: int = 256
    lambda_: float = 0.7

    @property
    def padded(self) -> int:
        """Tokens of whole tiles and whole blocks of text."""
        block = prod(self.tile)
        tiles = prod(-(-n // side) for n, side in zip(self.thw, self.tile, strict=True))
        return (tiles + -(-self.text // block)) * block


@dataclass(frozen=True)
class Case:
    """One attention. Small numbers of ``importance`` are measured first."""

    name: str
    heads: int
    q_len: int
    kv_len: int
    head_dim: int = 128
    q_block: int = 384
    kv_block: int = 384
    mask: str = "dense"
    # Of the blocks of a row (random), or of half a window's width (window); how many tokens a query
    # sees to each side (local).
    rate: float = 1.0
    # Blocks of text behind a random mask's: they see all, and all see them.
    text_blocks: int = 0
    dtype: str = "bfloat16"
    importance: int = 2
    batch: int = 1
    video: Video | None = None


@dataclass(frozen=True)
class Suite:
    """Cases that belong together in tables and plots."""

    name: str
    title: str
    cases: tuple[Case, ...]
    # Kinds of devices that it is for.
    devices: tuple[str, ...] = ("cuda",)
    # Whether it is measured only where it is named.
    on_request: bool = False


def case(
    heads: int, tokens: int, mask: str = "dense", rate: float = 1.0, *, name: str = "", **others
) -> Case:
    """A case of as many queries as keys; without a name, one that says mask and size. A block is of
    so many queries and keys, or of a pair of both."""
    block = others.pop("block", 384)
    q_block, kv_block = block if isinstance(block, tuple) else (block, block)
    if not name:
        kind = f"{mask} {rate:g}" if mask in ("window", "random", "local") else mask
        name = f"{kind} h{heads} s{tokens}"
    return Case(
        name,
        heads,
        tokens,
        tokens,
        q_block=q_block,
        kv_block=kv_block,
        mask=mask,
        rate=rate,
        **others,
    )


def video(name: str, heads: int, of: Video, **others) -> Case:
    """SSTA end to end: from tokens in the video's order back to them."""
    block = prod(of.tile)
    return Case(
        f"ssta {name} h{heads}",
        heads,
        of.padded,
        of.padded,
        q_block=block,
        kv_block=block,
        mask="ssta",
        video=of,
        **others,
    )


def _importance(tokens: int, rate: float = 0.6) -> int:
    """Of a case of the reference's suites."""
    if rate not in FIRST_RATES:
        return 3
    if tokens in FIRST_LENGTHS:
        return 1
    return 2 if tokens == LENGTHS[-1] else 3


def _lengths(heads: int) -> tuple[Case, ...]:
    return tuple(case(heads, n, importance=_importance(n)) for n in LENGTHS)


def _rates(heads: int, mask: str) -> tuple[Case, ...]:
    return tuple(
        case(heads, n, mask, rate, importance=_importance(n, rate))
        for n in LENGTHS
        for rate in RATES
    )


def _blocks() -> tuple[Case, ...]:
    return tuple(
        case(
            24,
            30720,
            "random",
            rate,
            block=block,
            name=f"blocks {block} {rate:g} h24 s30720",
            importance=1 if rate in (0.1, *FIRST_RATES) else 2,
        )
        for block in (64, 128, 384)
        for rate in (0.1, *RATES)
    )


def _head_dims() -> tuple[Case, ...]:
    return tuple(
        case(
            24,
            tokens,
            mask,
            rate,
            head_dim=dim,
            block=128,
            name=f"{mask} {rate:g} d{dim} h24 s{tokens}",
            importance=1 if tokens == 30720 else 2,
        )
        for dim in (64, 128)
        for tokens in (15360, 30720)
        for mask, rate in (("dense", 1.0), ("random", 0.2))
    )


def _causal() -> tuple[Case, ...]:
    return tuple(
        case(
            24,
            tokens,
            mask,
            head_dim=dim,
            # Where a mask is exact, the size of blocks is ours to choose.
            block=(192, 128) if (mask, dim) == ("causal", 64) else 128,
            name=f"{mask} d{dim} h24 s{tokens}",
            importance=(1 if tokens == 30720 else 2) - (mask == "causal" and dim == 128),
        )
        for mask in ("causal", "causal blocks")
        for dim in (64, 128)
        for tokens in (15360, 30720)
    )


def _local() -> tuple[Case, ...]:
    return tuple(
        case(24, tokens, "local", 4096.0, block=128, importance=0) for tokens in (30720, 61440)
    )


def _bars() -> tuple[Case, ...]:
    """The cases that the kernels are tuned by."""

    def dense(heads: int, tokens: int, name: str = "", **others) -> Case:
        name = name or f"dense h{heads} s{tokens}"
        return case(heads, tokens, block=128, name=name, importance=0, **others)

    def random(block: int, rate: float, heads: int, tokens: int, name: str = "", **others) -> Case:
        name = name or f"{block} {rate:g} h{heads} s{tokens}"
        return case(heads, tokens, "random", rate, block=block, name=name, importance=0, **others)

    # As many blocks as HunyuanVideo-1.5's SSTA has at 720p, of its heads, without text and with it.
    tiles, text = 360, 6
    return (
        dense(24, 15360),
        dense(24, 30720),
        random(384, 0.6, 24, 30720),
        random(384, 0.2, 24, 30720),
        random(128, 0.2, 24, 30720),
        random(64, 0.2, 24, 30720),
        random(64, 0.1, 24, 30720),
        dense(1, 11520),
        dense(1, 30720),
        dense(1, 61440),
        random(384, 0.6, 1, 11520),
        random(384, 0.6, 1, 19200),
        random(384, 0.6, 1, 30720),
        random(384, 0.6, 1, 61440),
        # Four blocks to each side.
        case(24, 61440, "window", 5 / 160, name="window of 9 384 h24 s61440", importance=0),
        random(384, 0.2, 16, 384 * tiles),
        random(
            384,
            0.2,
            16,
            384 * (tiles + text),
            f"384 0.2 h16 text {text} of {tiles + text}",
            text_blocks=text,
        ),
        dense(24, 15360, "dense h24 s15360 d64", head_dim=64),
    )


def _cpu() -> tuple[Case, ...]:
    """What a CPU does in minutes: the same kinds of cases, small."""

    def of(tokens: int, mask: str = "dense", rate: float = 1.0, **others) -> Case:
        return case(2, tokens, mask, rate, **{"block": 128, "dtype": "float32", **others})

    return (
        *(of(n, importance=0) for n in (1024, 2048, 4096)),
        *(of(n, "random", 0.2, importance=0) for n in (1024, 2048, 4096)),
        *(of(2048, "random", rate, importance=1) for rate in (0.1, 0.4, 0.6, 0.8)),
        *(of(2048, "window", rate) for rate in (0.1, 0.2)),
        of(2048, "causal blocks"),
        of(2048, "causal"),
        of(2048, "local", 256.0),
        of(2048, "random", 0.2, block=64, name="random 0.2 h2 s2048 b64"),
        of(2048, head_dim=64, name="dense h2 s2048 d64"),
        of(2048, "random", 0.2, head_dim=64, name="random 0.2 h2 s2048 d64"),
        of(2048, dtype="bfloat16", name="dense h2 s2048 bf16"),
        of(2048, "random", 0.2, dtype="bfloat16", name="random 0.2 h2 s2048 bf16"),
        video(
            "7x15x24",
            2,
            Video((7, 15, 24), topk=4, tile=(2, 8, 8), window=(3, 1, 1), text=100),
            dtype="float32",
        ),
    )


def _smoke() -> tuple[Case, ...]:
    """One of each kind, so small that it takes seconds anywhere."""

    def of(mask: str, rate: float = 1.0, tokens: int = 200) -> Case:
        name = f"{mask} s{tokens}"
        return case(2, tokens, mask, rate, block=64, head_dim=64, name=name, importance=0)

    clip = Video((3, 6, 8), topk=2, tile=(2, 4, 8), window=(1, 1, 1), text=20)
    return (
        *(of(mask, 0.5) for mask in ("dense", "window", "random", "causal blocks", "causal")),
        of("local", 50),
        *(of("dense", tokens=n) for n in (100, 400)),
        *(of("random", 0.5, tokens=n) for n in (100, 400)),
        video("3x6x8", 2, clip, head_dim=64, importance=0),
    )


def _all() -> tuple[Suite, ...]:
    sweeps = (
        ("full", "Dense attention", _lengths),
        ("window", "Sliding window, blocks of 384", lambda heads: _rates(heads, "window")),
        ("random", "Random blocks of 384", lambda heads: _rates(heads, "random")),
    )
    of_hunyuan = (("720p", Video((31, 45, 80), topk=64)), ("480p", Video((31, 30, 52), topk=32)))
    ssta = tuple(video(name, 16, of, importance=0) for name, of in of_hunyuan)
    return (
        Suite("bars", "Cases that the kernels are tuned by", _bars()),
        Suite("ssta", "SSTA of a video, end to end", ssta),
        *(
            Suite(f"{name}-h{heads}", f"{title}, {heads} head{'s' * (heads > 1)}", make(heads))
            for name, title, make in sweeps
            for heads in (1, 24)
        ),
        Suite("blocks", "Random blocks of 64, 128 and 384", _blocks()),
        Suite("head-dims", "Head dimensions 64 and 128", _head_dims()),
        Suite("causal", "Causal, exact and in whole blocks", _causal()),
        Suite("local", "Sliding window to the token", _local()),
        Suite("cpu", "Small cases for a CPU", _cpu(), ("cpu",)),
        Suite("smoke", "One tiny case of each kind", _smoke(), ("cuda", "cpu"), True),
    )


SUITES: dict[str, Suite] = {suite.name: suite for suite in _all()}
