"""Types of the extension module; crates/python is what they describe."""

from typing import Any, TypedDict

from torch import Tensor

__version__: str

class _Gpu(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    # The CUDA version up to which the driver goes.
    driver_version: tuple[int, int]
    # Why it cannot run our kernels.
    problem: str | None

class _Report(TypedDict):
    # Instruction sets of the CPU backend's products.
    float32: str
    bf16: str
    threads: int
    # Why no GPU can be reached; then there are none.
    gpu_problem: str | None
    gpus: list[_Gpu]

# (q_len, kv_len, q_block, kv_block)
_Sizes = tuple[int, int, int, int]
# (plan, q_block, kv_block)
_Plan = tuple[Tensor, int, int]
# (canvas, tile, tokens of text, whether padding is zeros)
_Video = tuple[tuple[int, int, int], tuple[int, int, int], int, bool]
# (canvas, tile, tokens of text, whether padding counts as zeros, or None of tokens in tile order)
_Order = tuple[tuple[int, int, int], tuple[int, int, int], int, bool | None]
# (tiles that a row keeps, weight of relevance if by importance, whether heads share a mask)
_Choice = tuple[int, float | None, bool]
# A formula's text, and its tables: contiguous int32 tensors
_Exact = tuple[str, list[Tensor]]
MOST_PARTS: int

def forward(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: _Plan,
    settings: tuple[float, int],
    outputs: tuple[Tensor, Tensor],
    exact: _Exact | None = None,
    video: _Video | None = None,
) -> None: ...
def backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    plan: _Plan,
    settings: tuple[float, int],
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    exact: _Exact | None = None,
    video: _Video | None = None,
) -> None: ...
def forward_cuda(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: _Plan,
    scale: float | None,
    out: Tensor,
    lse: Tensor | None,
    exact: _Exact | None,
    video: _Video | None = None,
    alike: bool = False,
) -> None: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sizes: _Sizes,
    scale: float | None,
    wanted: tuple[bool, bool],
    exact: _Exact | None,
    alike: bool,
) -> tuple[Tensor, Tensor | None] | None: ...
def are_ready(q: Tensor, k: Tensor, v: Tensor) -> bool: ...
def must_be_copied(tensor: Tensor) -> bool: ...
def combine_cuda(parts: list[tuple[Tensor, Tensor]], out: Tensor, lse: Tensor) -> None: ...
def select_numbers(q: Tensor, k: Tensor, order: _Order, choice: _Choice) -> int | None: ...
def select_cuda(
    inputs: tuple[Tensor, Tensor],
    order: _Order,
    choice: _Choice,
    base: Tensor,
    text_lengths: Tensor | None,
    mask: Tensor,
    workspace: Tensor,
) -> None: ...
def backward_workspace(
    q_shape: tuple[int, ...],
    deterministic: bool,
    keys: tuple[tuple[int, ...], int, int, int] | None = None,
) -> int: ...
def backward_cuda(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    plan: _Plan,
    settings: tuple[float, bool],
    outputs: tuple[Tensor, Tensor, Tensor],
    workspace: int,
    exact: _Exact | None,
    video: _Video | None = None,
) -> None: ...
def default_block(q_len: int, kv_len: int) -> int: ...
def moved(text: str, places: tuple[tuple[int, int], ...]) -> str: ...
def plan_words(sizes: _Sizes) -> int: ...
def write_plan(
    blocks: tuple[int, tuple[int, ...], tuple[int, ...]], sizes: _Sizes, to: tuple[int, int]
) -> None: ...
def doctor() -> _Report: ...
def plan_shape(blocks: Tensor, sizes: _Sizes) -> tuple[int, int, int] | None: ...
def plan_cuda(blocks: Tensor, sizes: _Sizes, to: Tensor, video: _Video | None = None) -> None: ...
def plan_mask_cuda(mask: BlockMask, bits: Tensor, to: Tensor) -> None: ...

class Steps:
    def number(self, n: int) -> int: ...
    def truth(self, truth: bool) -> int: ...
    def put(self, name: str, *operands: int) -> int: ...
    def look_up(self, table: int, indices: list[int]) -> int: ...
    def finish(self, root: int) -> tuple[str, list[int], tuple[bool, bool]]: ...

class Term:
    writer: Any
    step: int
    is_truth: bool

    def __init__(self, writer: Any, step: int, is_truth: bool) -> None: ...
    def abs(self) -> Term: ...

class BlockMask:
    @property
    def is_full(self) -> bool: ...
    @staticmethod
    def full(sizes: _Sizes) -> BlockMask: ...
    @staticmethod
    def causal(sizes: _Sizes) -> BlockMask: ...
    @staticmethod
    def sliding_window(sizes: _Sizes, left: int, right: int) -> BlockMask: ...
    @staticmethod
    def random(sizes: _Sizes, batch: int, heads: int, density: float, seed: int) -> BlockMask: ...
    @staticmethod
    def sta(
        tiles: tuple[int, ...], window: tuple[int, ...], tile_tokens: int, text_tokens: int
    ) -> BlockMask: ...
    @staticmethod
    def from_blocks(sizes: _Sizes, blocks: list[tuple[int, int]]) -> BlockMask: ...
    @staticmethod
    def from_bytes(sizes: _Sizes, batch: int, heads: int, bytes: bytes) -> BlockMask: ...
    @staticmethod
    def from_expression(sizes: _Sizes, batch: int, heads: int, exact: _Exact) -> BlockMask: ...
    @staticmethod
    def from_parts(
        sizes: _Sizes, batch: int, heads: int, wanted: bytes, partial: bytes, exact: _Exact
    ) -> BlockMask: ...
    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def extents(self) -> _Sizes: ...
    def density(self) -> float: ...
    # Computed blocks, and those of them that are partial.
    def counts(self) -> tuple[int, int]: ...
    def bit_words(self) -> int: ...
    def write_plan(self, to: tuple[int, int]) -> None: ...
    # Whether its expression looks up these numbers.
    def looks_up_as(self, exact: _Exact) -> bool: ...
    def partial_bytes(self) -> bytes: ...
    def tokens(self, batch: int, head: int) -> bytes: ...
    def to_bytes(self) -> bytes: ...
    def picture(self, batch: int, head: int, columns: int) -> str: ...
