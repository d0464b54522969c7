"""Which path computes a kernel: Triton on a GPU or under the interpreter, plain torch elsewhere."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_cpu_tensors_take_the_torch_path_unless_asked():
    assert not kernels.uses_triton(torch.zeros(1))
    with pytest.raises(ValueError, match="got 'cuda', want 'auto', 'torch' or 'triton'"):
        kernels.use("cuda")


def test_describe_names_the_path(triton_path):
    if kernels.INTERPRET:
        assert kernels.describe() == "kernels: triton (interpreter)"
    kernels.use("torch")
    assert kernels.describe() == "kernels: torch (as asked)"
    assert not kernels.uses_triton(torch.zeros(1, device=DEVICE))
    kernels.use("auto")
    want = "kernels: triton (" if DEVICE == "cuda" else "kernels: torch (no GPU)"
    assert kernels.describe().startswith(want)


def test_without_triton_the_torch_path_announces_itself():
    code = """if True:
        import sys
        sys.modules["triton"] = None                             # import triton now raises ImportError
        import torch, kernels
        import kernels.draw_markers, kernels.log_ratio, kernels.pair_credit, kernels.pair_reward
        from kernels.sde_step import sde_step
        x = torch.zeros(2, 3)
        assert sde_step(x, x, x[:, None], 1.0, -0.1, 0.5)[0].shape == (2, 1, 3)
        print(kernels.describe())"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "kernels: torch (triton is not installed)", done.stderr
