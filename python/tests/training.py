"""A small model that is trained: what it is, and the video that it learns to denoise.

In: the attention to train with. Out: a loss for each step. The clip is the demo's, and a moving
pattern stands in for it where the demo or what it needs is not at hand.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZE = 4, 32, 32
"""Frames, height and width of the crop."""
PATCH = 4
"""Pixels of a token, along height and width."""
TOKENS = SIZE[0] * (SIZE[1] // PATCH) * (SIZE[2] // PATCH)


class Model(nn.Module):
    """Two layers of attention and a readout; ``attend`` is the attention of (q, k, v)."""

    def __init__(self, attend: Attend, width: int = 16, heads: int = 2, read: int = 1):
        super().__init__()
        self.attend, self.heads = attend, heads
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.merge = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.readout = nn.Linear(width, read)

    def forward(self, x: Tensor) -> Tensor:
        for project, merge in zip(self.project, self.merge, strict=True):
            q, k, v = project(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + merge(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.readout(x)


def clip() -> Tensor:
    """A crop of the demo's clip, (frames, height, width, 3) in 0..1."""
    try:
        from demo import video
        from demo.errors import DemoError
    except ImportError:
        return _pattern()
    try:
        return video.read_crop(video.find_clip("bikes.mp4"), 0, 64, 64, SIZE)
    except (DemoError, ImportError):
        return _pattern()


def _pattern() -> Tensor:
    t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in SIZE), indexing="ij")
    colours = [torch.sin((x + 2 * t) / 3 + c) * torch.cos(y / (4 + c)) for c in range(3)]
    return torch.stack(colours, dim=3) / 2 + 0.5


def patches(video: Tensor) -> Tensor:
    """A token for each patch of each frame: (1, tokens, numbers of a patch)."""
    frames, height, width = SIZE
    split = video.view(frames, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return split.permute(0, 1, 3, 2, 4, 5).reshape(1, TOKENS, PATCH * PATCH * 3)


def denoising(
    attend: Attend, width: int, heads: int, steps: int, device: str = "cpu"
) -> Iterator[float]:
    """The losses of a model that learns to say what patches were before noise came to them."""
    generator = torch.Generator().manual_seed(2)
    clean = patches(clip()) - 0.5
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    lift = torch.randn(clean.shape[2], width, generator=generator) / clean.shape[2] ** 0.5
    x, target = (noisy @ lift).to(device), clean.to(device)
    torch.manual_seed(1)
    model = Model(attend, width, heads, clean.shape[2]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
