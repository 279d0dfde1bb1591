"""Processes that play the ranks of a group, started once for many tests.

Functions are sent to them by name, with arguments, and run on the first ``size`` ranks, each in a
group of that size. gloo, one thread for each rank.
"""

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

MOST = 4
# Ranks that wait for one that has failed give up after this time.
PATIENCE = timedelta(seconds=30)


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, MOST), rank=rank, world_size=MOST, timeout=PATIENCE
    )
    groups = {size: dist.new_group(range(size), timeout=PATIENCE) for size in range(1, MOST + 1)}
    while (job := pipe.recv()) is not None:
        function, size, arguments = job
        try:
            torch.manual_seed(0)
            pipe.send((True, function(groups[size], **arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Up to :data:`MOST` ranks."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, f"{self._folder.name}/store", theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What ``function(group, **arguments)`` returns on each of ``size`` ranks."""
        for pipe in self._pipes[:size]:
            pipe.send((function, size, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(2 * PATIENCE.total_seconds()), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        failed = [f"rank {i}: {text}" for i, (good, text) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()
