"""How to use the library in models that exist, and to build selections of your own.

A file each. The first three replace a model's attention and need the model's own package:

- `hunyuan_video.py`: HunyuanVideo-1.5, whose sparse checkpoints are trained with SSTA;
- `wan_diffusers.py`: Wan in diffusers, by an attention processor;
- `fastvideo_sta.py`: FastVideo's sliding tiles, by a module under the name it imports.

The others are selections made of the pieces of `flex_block_attn.selection`:

- `vsa.py`: VSA, a coarse attention over tiles that chooses for the fine one;
- `vmoba.py`: VMoBA, chunks chosen by count or by mass.
"""
