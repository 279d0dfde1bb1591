"""HunyuanVideo-1.5 over this library.

Its own sparse attention runs as it is: it calls `flex_block_attn.flex_block_attn_func`, which is
this package's. `patch()` goes further and replaces the function around it, which pads, tiles,
builds masks and attends, wherever a module has imported it:

    import hyvideo.models.transformers.hunyuanvideo_1_5_transformer
    from examples.hunyuan_video import patch

    patch()

Masks and results stay the same; loops over heads and batches, and waits for the GPU, go. The
density that comes back with the output is a tensor: `float(density)` waits for the GPU.
"""

import sys

from flex_block_attn.ssta_attention import ssta_3d_attention


def patch() -> list[str]:
    """Replaces the function in all modules that have it, and returns their names."""
    known = (None, ssta_3d_attention)
    modules = [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__dict__", {}).get("ssta_3d_attention") not in known
    ]
    if not modules:
        raise RuntimeError("no module has ssta_3d_attention: import the model before patch()")
    for module in modules:
        module.ssta_3d_attention = ssta_3d_attention
    return [module.__name__ for module in modules]
