"""Pictures of masks. Called by users; needs matplotlib, which is imported only here."""

from typing import Any


def visualize_attn_mask(
    mask: Any,
    title: str = "Attention Mask",
    cmap: str = "gray",
    save_path: str | None = "attention_mask.png",
) -> None:
    """Draws a mask, of blocks or of tokens.

    Args:
        mask: two-dimensional array or tensor of bools or numbers, which are scaled to 0..1; or a
            :class:`BlockMask`, whose first batch and head are drawn.
        title: title of the picture.
        cmap: a colour map's name of matplotlib.
        save_path: file to write; ``None`` shows a window instead.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "visualize_attn_mask needs matplotlib: pip install 'flex-block-attn[plot]'"
        ) from error
    import numpy as np

    values = getattr(mask, "blocks", mask)
    if values is not mask:
        values = values[0, 0]
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.numpy() if not values.is_floating_point() else values.float().numpy()
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"mask must have 2 dimensions, got shape {values.shape}")
    values = values.astype(float)
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if low < 0 or high > 1:
        values = (values - low) / (high - low or 1.0)

    figure, axes = plt.subplots(figsize=(8, 8))
    try:
        figure.colorbar(axes.imshow(values, cmap=cmap, vmin=0, vmax=1, interpolation="nearest"))
        axes.set(title=title, xlabel="key blocks", ylabel="query blocks")
        if save_path is None:
            plt.show()
        else:
            figure.savefig(save_path, bbox_inches="tight", dpi=300)
    finally:
        plt.close(figure)
