"""Types of the extension module; crates/python is what they describe."""

from typing import TypedDict

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
# (device ordinal, stream handle)
_Stream = tuple[int, int]

# Bytes of forward_cuda's workspace.
FORWARD_WORKSPACE_BYTES: int

def forward(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: _Plan,
    settings: tuple[float, int],
    outputs: tuple[Tensor, Tensor],
) -> None: ...
def backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    plan: _Plan,
    settings: tuple[float, int],
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None: ...
def forward_cuda(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: _Plan,
    scale: float,
    out: Tensor,
    rows: int,
    on: _Stream,
) -> None: ...
def backward_workspace(q_shape: tuple[int, ...], deterministic: bool) -> tuple[int, int]: ...
def backward_cuda(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    plan: _Plan,
    scale: float,
    outputs: tuple[Tensor, Tensor, Tensor],
    workspace: tuple[int, int],
    on: _Stream,
) -> None: ...
def plan_words(sizes: _Sizes) -> int: ...
def write_plan(
    blocks: tuple[int, tuple[int, ...], tuple[int, ...]], sizes: _Sizes, to: tuple[int, int]
) -> None: ...
def doctor() -> _Report: ...
def plan_cuda(
    blocks: tuple[int, tuple[int, ...], tuple[int, ...]],
    sizes: _Sizes,
    to: tuple[int, int],
    on: _Stream,
) -> None: ...

class BlockMask:
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
    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def extents(self) -> _Sizes: ...
    def density(self) -> float: ...
    def to_bytes(self) -> bytes: ...
    def picture(self, batch: int, head: int, columns: int) -> str: ...
