"""Rows of tensors that change ranks. In: rows sorted by the rank they go to. Out: rows sorted by
the rank they come from.

Called by everything here that communicates. Nearly all of it is one collective,
``all_to_all_single`` with counts: it runs on gloo as on NCCL, and a rank that has nothing to send
is no special case. What goes to all ranks, as much from each, is gathered instead: that needs no
copies to send; several tensors between two ranks go as one. Bytes are sent, so every dtype travels
on every backend.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def place_in(group: dist.ProcessGroup | None, name: str = "group") -> tuple[int, int]:
    """This process's rank in a group, and the group's size; ``None`` is the group of all."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{name}: torch.distributed is not initialised; start the program with torchrun and "
            "call torch.distributed.init_process_group() first"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        # Of a group that a process is not in, torch gives it a number instead.
        raise ValueError(f"{name} must be a process group that this process is in, got {group!r}")
    return dist.get_rank(group), dist.get_world_size(group)


def wide(x: Tensor) -> Tensor:
    """The same bytes as numbers of 16, where they lie so: torch's copies through indices and
    between layouts take as long for a small number as for a large one."""
    count = 16 // x.element_size()
    steps = *x.stride()[:-1], x.shape[-1], x.storage_offset()
    fits = x.stride(-1) == 1 and not any(step % count for step in steps)
    return x.view(torch.complex128) if fits else x


def copy_wide(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` of one dtype, 16 bytes at a time where both lie so."""
    to, of = wide(target), wide(source)
    if to.dtype == of.dtype:
        to.copy_(of)
    else:
        target.copy_(source)


class Exchange:
    """Rows on their way. They leave when this is made; :meth:`wait` gives those that came.

    NCCL sends on a stream of its own, and :meth:`wait` makes the current stream wait, not the
    host: what is launched between the two runs meanwhile. On gloo :meth:`wait` blocks.

    Args:
        rows: (rows, ...), those to rank 0 first.
        send: rows for each rank of the group.
        receive: rows from each rank of the group.
        group: the ranks; ``None`` are all.
        into: a contiguous tensor for the rows that come; a new one if not given.
    """

    def __init__(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup | None,
        into: Tensor | None = None,
    ):
        # Of bytes, numbers that are rows themselves are as many rows each.
        size = rows.element_size() if rows.dim() == 1 else 1
        counts = [n * size for n in receive], [n * size for n in send]

        def start(target: Tensor, source: Tensor) -> dist.Work:
            return dist.all_to_all_single(target, source, *counts, group=group, async_op=True)

        self._leave(rows, sum(receive), group, into, start)

    @classmethod
    def to_all(
        cls,
        rows: Tensor,
        counts: Sequence[int],
        group: dist.ProcessGroup | None,
        into: Tensor | None = None,
    ) -> "Exchange":
        """This rank's rows to all ranks.

        Args:
            counts: rows of each rank.
        """
        ranks = len(counts)
        if counts.count(counts[0]) < ranks:
            copies = rows.repeat(ranks, *(1,) * (rows.dim() - 1))
            return cls(copies, [len(rows)] * ranks, counts, group, into)

        def start(target: Tensor, source: Tensor) -> dist.Work:
            return dist.all_gather_into_tensor(target, source, group=group, async_op=True)

        exchange = cls.__new__(cls)
        exchange._leave(rows, sum(counts), group, into, start)
        return exchange

    def _leave(
        self,
        rows: Tensor,
        count: int,
        group: dist.ProcessGroup | None,
        into: Tensor | None,
        start: Callable[[Tensor, Tensor], dist.Work],
    ) -> None:
        came = rows.new_empty((count, *rows.shape[1:])) if into is None else into
        self._way = _Way([rows], [came], group, lambda to, of: [start(*to, *of)])

    def wait(self) -> Tensor:
        """(received rows, ...), those from rank 0 first."""
        (came,) = self._way.wait()
        return came


class _Way:
    """Tensors on their way as bytes, into tensors that are contiguous.

    Args:
        start: has the second tensors leave for the first, and gives what to wait for.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        came: Sequence[Tensor],
        group: dist.ProcessGroup | None,
        start: Callable[[list[Tensor], list[Tensor]], list[dist.Work]],
    ):
        self._came = list(came)
        # gloo sends from the host's memory only.
        self._staged = tensors[0].is_cuda and dist.get_backend(group) == "gloo"
        # Kept until they have left.
        self._bytes = [x.contiguous().view(torch.uint8) for x in tensors]
        self._targets = [x.view(torch.uint8) for x in self._came]
        if self._staged:
            self._bytes = [x.cpu() for x in self._bytes]
            self._targets = [x.cpu() for x in self._targets]
        self._works = start(self._targets, self._bytes)

    def wait(self) -> list[Tensor]:
        """What came."""
        for work in self._works:
            work.wait()
        if self._staged:
            for came, target in zip(self._came, self._targets, strict=True):
                came.view(torch.uint8).copy_(target)
        self._works, self._bytes, self._targets, self._staged = [], [], [], False
        return self._came


class Swap:
    """Several tensors of numbers on their way, as :class:`Exchange`, but all as one: what would
    follow on the exchanges' stream finds no room on a GPU while attention has it.

    Args:
        tensors: of one length, numbers to rank 0 first; none to this rank itself.
        send: numbers of each for each rank of the group.
        receive: numbers of each from each rank of the group.
        group: the ranks; ``None`` are all.
        into: contiguous tensors for the numbers that come; new ones if not given.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup | None,
        into: Sequence[Tensor] | None = None,
    ):
        size = tensors[0].element_size()

        def start(targets: list[Tensor], sources: list[Tensor]) -> list[dist.Work]:
            operations = []
            for each, counts, operation in (
                (sources, send, dist.isend),
                (targets, receive, dist.irecv),
            ):
                for x in each:
                    for peer, part in enumerate(x.split([n * size for n in counts])):
                        if len(part):
                            rank = peer if group is None else dist.get_global_rank(group, peer)
                            operations.append(dist.P2POp(operation, part, rank, group))
            return dist.batch_isend_irecv(operations) if operations else []

        came = into or [x.new_empty(sum(receive)) for x in tensors]
        self._way = _Way(tensors, came, group, start)

    def wait(self) -> list[Tensor]:
        """The numbers that came, those from rank 0 first."""
        return self._way.wait()


def let_pass(device: torch.device) -> None:
    """Has exchanges that have left begin before what is launched next on the current stream.

    Attention's thread blocks stay on a GPU until all is done, and exchanges come on a stream of
    their own, which learns a little later that it may begin: they would find no room, and be waited
    for after. So the current stream goes a longer way, by a stream that has something to do.
    """
    if device.type != "cuda":
        return
    current, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        torch.zeros(1, device=device)
    current.wait_stream(aside)


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Exchanged(torch.autograd.Function):
    """Several exchanges at once. One node for all of them, so that in the backward pass every rank
    takes part in each, whichever of the tensors a rank's result depends on."""

    @staticmethod
    def forward(ctx: Any, group: Any, counts: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.counts = group, counts
        return _all(tensors, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        back = [(receive, send) for send, receive in ctx.counts]
        return None, None, *_all(gradients, back, ctx.group)


def _all(tensors: Sequence[Tensor], counts: Any, group: Any) -> tuple[Tensor, ...]:
    under_way = [
        Exchange(tensor, send, receive, group)
        for tensor, (send, receive) in zip(tensors, counts, strict=True)
    ]
    return tuple(exchange.wait() for exchange in under_way)


def exchanged(
    tensors: Sequence[Tensor],
    counts: Sequence[tuple[Sequence[int], Sequence[int]]],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Rows of several tensors exchanged at once; differentiable: gradients go back where the rows
    came from.

    Args:
        tensors: each (rows, ...), those to rank 0 first.
        counts: of each tensor, the rows to send to each rank, and those to receive from each.
    """
    return _Exchanged.apply(group, counts, *tensors)


def gathered(
    rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None, name: str = "group"
) -> Tensor:
    """The rows of all ranks, in their order, on every rank; differentiable.

    Args:
        rows: (rows, ...).
        counts: rows of each rank.
    """
    _, ranks = place_in(group, name)
    copies = rows.repeat(ranks, *(1,) * (rows.dim() - 1))
    return exchanged([copies], [([rows.shape[0]] * ranks, counts)], group)[0]
