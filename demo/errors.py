"""The one exception of the demo.

In: a sentence. Out: `__main__.py` prints it as a single line and exits with status 1. Raised by
`denoise.py` and `video.py` for what the person who runs the demo can put right.
"""


class DemoError(Exception):
    """Something is missing or does not fit; the message says what, and what would."""
