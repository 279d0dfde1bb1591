"""About how long a pass of a case takes to measure, before it is. In: a case, and how it is
measured. Out: seconds.

Called by :mod:`.__main__`, which corrects it by how long passes before took. What it has to get
right is how passes compare: a few of the largest cases take as long as all others.
"""

from collections.abc import Iterable
from math import prod

from .suites import Case

# Operations a second of an implementation among others.
SPEED = {"cuda": 500e12, "cpu": 5e10}
# Seconds to make an implementation ready: to load, to allocate, to compare results.
READY = 0.2
# Seconds of who compiles for each shape of tensors, on a GPU.
COMPILES = {"Flex": 20.0}
# Calls besides those in turns: the first, one for the results, one for memory, one to warm up.
OTHER_CALLS = 4
# Who has what: whole attention, causal or not; lists of blocks, and of how many tokens; only a
# forward pass.
DENSE = {"FA3", "FA4", "cuDNN", "FA2", "Flex"}
SPARSE = {"FA4": 128, "Flex": 128, "VSA": 64}
FORWARD_ONLY = {"FA3"}


def operations(case: Case, backward: bool) -> float:
    """Of the pairs that are kept, about."""
    pairs = case.q_len * case.kv_len * case.batch * case.heads * _density(case)
    return 4.0 * pairs * case.head_dim * (2.5 if backward else 1.0)


def _density(case: Case) -> float:
    if case.mask == "window":
        return 1 - (1 - min(1.0, case.rate)) ** 2
    if case.mask == "local":
        return min(1.0, 2 * case.rate / case.kv_len)
    if case.video is not None:
        # Chosen tiles, those of the window, and text.
        of = case.video
        return min(1.0, (of.topk / 2 + prod(of.window)) * prod(of.tile) / case.kv_len + 0.03)
    return {"random": case.rate, "dense": 1.0}.get(case.mask, 0.5)


def has(name: str, case: Case, backward: bool, device: str) -> bool:
    """Whether a peer is likely to have such an attention."""
    if name == "ours" or device == "cpu":
        return True
    if backward and name in FORWARD_ONLY:
        return False
    if case.mask in ("dense", "causal", "local"):
        return name in DENSE
    block = SPARSE.get(name)
    return block is not None and case.q_block % block == 0 and case.kv_block % block == 0


def seconds(
    case: Case, names: Iterable[str], backward: bool, device: str, rounds: int, turn: float
) -> float:
    """Of a pass, ours and peers of these names; ``turn`` is in milliseconds."""
    call = operations(case, backward) / SPEED[device]
    total = 0.0
    for name in ("ours", *names):
        if has(name, case, backward, device):
            compiling = COMPILES.get(name, 0.0) if device == "cuda" else 0.0
            counted = call if 1e3 * call >= turn else max(2 * call, turn / 1e3)
            in_turns = rounds * (call + counted)
            total += READY + compiling + OTHER_CALLS * call + in_turns
    return total
