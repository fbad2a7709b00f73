import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, each with a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, here and in child processes

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network; it is read when transformers is first imported


@pytest.fixture
def one_thread():
    """A second thread only makes models this small wait for each other, and adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log_as_it_was():
    """Plugins of other tools set up the logger, in which other tests look for what is said."""
    logger = logging.getLogger("zest_fast")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]
