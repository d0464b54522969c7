"""Shared: Triton's interpreter where there is no GPU, one thread, a toy run, scenes, NaN-filled memory, small files.

Where there is a GPU, kernels are compiled and test_gpu.py runs; every other test means the CPU, whose results are
promised to the bit: --device auto is the CPU then, and programs that tests start in a fork see no GPU.
"""
import contextlib
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # modules and folders live in the root

# Triton reads this when it is first imported, and torch does not import it by itself.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic products are refused
    from runtime import ranks  # before the modules that take its functions by name
    pick_device = ranks.pick_device
    ranks.pick_device = lambda name, command: pick_device("cpu" if name == "auto" else name, command)

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A complete run folder at toy size: base, judge, bank, grpo, report.json, panel.png."""
    import test_train
    return test_train.tiny_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A folder of six scenes with known answers."""
    from rooms import write_scene
    folder = tmp_path_factory.mktemp("rooms")
    for i in range(6):
        write_scene(folder, f"room_{i}.cam.0", i)
    return folder


@pytest.fixture
def small_files():
    """Context in which a file may have so many bytes: what a full disk does, with another errno."""
    @contextlib.contextmanager
    def limited(most):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return limited


@pytest.fixture
def triton_path():
    """Send the public kernel functions to Triton; fill torch.empty with NaN to show an unwritten output."""
    pytest.importorskip("triton")
    import kernels

    was_strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)    # in this mode torch fills new memory with NaN
    kernels.use("triton")
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
    yield
    kernels.use("auto")
    torch.use_deterministic_algorithms(was_strict)
