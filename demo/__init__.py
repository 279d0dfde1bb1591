"""Non-local-means video denoising by dense and block-sparse attention: `python -m demo`.

Start reading at `denoise.py`.
"""
