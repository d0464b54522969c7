"""Which path computes a kernel: Triton on a GPU, its plain-torch `_ref` everywhere else.

Kernel files import `triton` and `tl` from here, so that they and their `_ref` can be imported where triton is not
installed. Under TRITON_INTERPRET=1 the interpreter runs kernels on CPU tensors, but only after `use("triton")`: it is
slow. On a GPU the first question is answered by a launch of one element: where Triton cannot launch, torch computes.

Every kernel is an operator `reasonx::NAME` of torch.library: torch.compile and torch.export keep it as one node, and
since it never waits for the GPU a CUDA graph captures it. What a caller must have checked is said in its docstring.
"""
import functools
import os
import subprocess
from types import SimpleNamespace

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")   # the default flips in Triton 3.10 and moves low bits
try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
    TritonError = triton.TritonError
except ImportError:                                      # no wheel for this platform, e.g. macOS
    triton = tl = SimpleNamespace(jit=lambda fn: fn, constexpr=None, float32=None, float64=None)
    HAS_TRITON = False
    TritonError = RuntimeError
LAYER = 1 << 22                                        # elements; below, a call costs the CPU more than eager's bytes
REFUSALS = (TritonError, RuntimeError, ImportError, OSError, subprocess.SubprocessError)    # of a launch

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_mode = "auto"


def use(mode):
    """Choose the path of the process: "auto" (triton on a GPU), "torch", or "triton" (for kernel tests)."""
    global _mode
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels.use: got {mode!r}, want 'auto', 'torch' or 'triton'")
    if mode == "triton" and not (INTERPRET or HAS_TRITON and torch.cuda.is_available()):
        raise ValueError("kernels.use: got 'triton', want triton, and a GPU or TRITON_INTERPRET=1")
    _mode = mode


def launch(kernel, grid, *args, **constants):
    """Launch a kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


@triton.jit
def _one_kernel(out_ptr):
    tl.store(out_ptr, 1.0)


@functools.cache
def launch_error():
    """Why Triton cannot launch on the GPU, in a line, or "". It builds its driver with a C compiler and Python.h."""
    try:
        one = torch.zeros(1, device="cuda")
        launch(_one_kernel, (1,), one)
        return "" if one.item() == 1 else "a launch wrote nothing"
    except REFUSALS as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:100]


def uses_triton(tensor):
    """Whether a kernel computes on `tensor` with Triton; otherwise its `_ref` does."""
    if not HAS_TRITON or _mode == "torch":
        return False
    if _mode == "triton":
        return tensor.is_cuda or INTERPRET
    return tensor.is_cuda and not launch_error()


def uses_triton_with_floats(tensor):
    """As `uses_triton`, for a kernel with Python floats among its arguments.

    A compiled kernel receives Python floats as fp32, so fp64 states take the torch path; the interpreter keeps fp64.
    """
    return uses_triton(tensor) and (INTERPRET or tensor.dtype != torch.float64)


def send(x, device):
    """A CPU tensor on a device. A GPU is not waited for: the tensor is copied through pinned memory."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def fuses_layer(x):
    """Whether a network's layer takes its kernel on x: under autocast, with Triton, uncompiled, if x is large enough.

    torch.compile fuses such a layer with what stands beside it, which an operator would forbid.
    """
    if torch.compiler.is_compiling() or x.numel() < LAYER or not uses_triton(x):
        return False
    return torch.is_autocast_enabled(x.device.type)


def acc_dtype(*tensors):
    """Dtype of arithmetic on these tensors: fp32, or fp64 when one of them is."""
    acc = torch.float32
    for z in tensors:
        acc = torch.promote_types(acc, z.dtype)
    return acc


def triton_dtype(acc):
    """Triton's name of such a dtype."""
    return tl.float64 if acc == torch.float64 else tl.float32


@triton.jit
def exact_div(x, y):
    """x / y rounded to nearest, as in torch; Triton's `/` is up to 2 ulp off in fp32, which can flip a relation."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def exact_sqrt(x):
    """Square root rounded to nearest, as in torch."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


def describe():
    """One line that names the path, e.g. `kernels: triton (sm90)` or `kernels: torch (no GPU)`."""
    if _mode == "torch":
        return "kernels: torch (as asked)"
    if not HAS_TRITON:
        return "kernels: torch (triton is not installed)"
    if not torch.cuda.is_available() and not (INTERPRET and _mode == "triton"):
        return "kernels: torch (no GPU)"
    if INTERPRET:
        return "kernels: triton (interpreter)"
    if _mode == "auto" and launch_error():
        return f"kernels: torch (Triton cannot launch: {launch_error()})"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = device.gcnArchName.split(":")[0] if torch.version.hip else f"sm{device.major}{device.minor}"
    return f"kernels: triton ({arch})"
