"""What every test starts from: the same random numbers, the same number of threads."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
