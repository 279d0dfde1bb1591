"""The one exception of the demo.

In: a sentence. Out: `denoise.py` prints it as a single line and exits with status 1. Raised by
every file of the demo for what the person who runs it can put right.
"""


class DemoError(Exception):
    """Something is missing or does not fit; the message says what, and what would."""
