"""What a plan costs each rank, as numbers and as a table. Made by :mod:`.plan`, read by users."""

from dataclasses import dataclass

import torch

from .balance import balance


@dataclass(frozen=True)
class RankReport:
    """One rank's share of an attention. Bytes are those of a forward pass."""

    #: Blocks of queries that it holds.
    q_blocks: int
    #: Blocks that it computes, the mean over heads.
    blocks: float
    #: Blocks of keys that it holds.
    kv_blocks: int
    #: Blocks of keys that others send it, the mean over heads.
    received: float
    #: What comes: keys, values, shared queries, partial outputs of shared queries.
    bytes_in: int
    #: What goes.
    bytes_out: int
    #: What would come in a ring that passes all keys and values to all ranks.
    ring_bytes: int


@dataclass(frozen=True)
class Report:
    """All ranks of a plan; printed, a table."""

    ranks: list[RankReport]

    @property
    def balance(self) -> float:
        """Mean over maximum of the blocks that ranks compute: 1 if all are done together."""
        return balance(torch.tensor([rank.blocks for rank in self.ranks], dtype=torch.float64))

    @property
    def bytes_moved(self) -> int:
        """What comes to all ranks together."""
        return sum(rank.bytes_in for rank in self.ranks)

    @property
    def ring_bytes(self) -> int:
        """What would come to all ranks together in a ring."""
        return sum(rank.ring_bytes for rank in self.ranks)

    def __str__(self) -> str:
        lines = ["rank  q blocks    blocks  kv blocks  received    MB in   MB out  MB in a ring"]
        for number, rank in enumerate(self.ranks):
            lines.append(
                f"{number:4}  {rank.q_blocks:8}  {rank.blocks:8.1f}  {rank.kv_blocks:9}  "
                f"{rank.received:8.1f}  {rank.bytes_in / 1e6:7.1f}  {rank.bytes_out / 1e6:7.1f}  "
                f"{rank.ring_bytes / 1e6:12.1f}"
            )
        share = self.bytes_moved / self.ring_bytes if self.ring_bytes else 0.0
        lines.append(
            f"balance {self.balance:.3f}, {self.bytes_moved / 1e6:.1f} MB moved, "
            f"{100 * share:.1f}% of a ring's"
        )
        return "\n".join(lines)
