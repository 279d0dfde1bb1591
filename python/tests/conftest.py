"""What every test starts from: the same random numbers, the same number of threads."""

import pytest
import torch
from ranks import Ranks


@pytest.fixture(autouse=True)
def same_start():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks():
    """Processes for tests of :mod:`flex_block_attn.distributed`, started by the first of them."""
    started = Ranks()
    yield started
    started.close()
