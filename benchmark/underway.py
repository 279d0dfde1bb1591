"""Who is being measured: who does not end, or takes the process along, is given up.

In: what is begun. Out: a file that says so until it has ended, and an alarm that ends the process,
whatever it is stuck in. The process that goes on finds the file. Used by :mod:`benchmark.__main__`.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .results import Unit


class Underway:
    """The file, and for how many seconds somebody is waited for."""

    def __init__(self, path: Path, patience: float):
        self.path, self.patience = path, patience

    def left(self) -> Unit:
        """Who was being measured when the process before was ended by that, which is told once."""
        if not self.path.exists():
            raise ValueError("the process before was ended while nobody was being measured")
        unit = Unit(**json.loads(self.path.read_text()))
        self.path.unlink()
        return unit

    @contextmanager
    def measuring(self, unit: Unit) -> Iterator[None]:
        """Something of a unit that is to end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(asdict(unit)))
        # Not by a handler: what is stuck may keep the interpreter from running one.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.patience)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.path.unlink(missing_ok=True)
