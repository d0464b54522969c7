"""Every AOT entry compiles for each GPU target, no GPU needed, spills nothing and stays within its registers.

Run as a script (`python tests/test_aot.py`) it compiles for all of them and prints a JSON line for each entry: a
process of its own, since under TRITON_INTERPRET a kernel cannot be compiled.
"""
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
REGISTERS = dict(_pair_reward_kernel=176, _pair_credit_kernel=96, _log_ratio_fwd_kernel=96)
# Ceilings per thread. Others: 64 (62 measured), so that 65,536 / 64 = 1,024 threads fit on one SM. Measured over the
# targets: pair_reward 14 to 44 for one pixel, up to 169 for a window of 5 x 5, whose loads LLVM unrolls (4 warps: 3
# programs on an SM); pair_credit 92 (32 x 32 tile in registers); log_ratio forward 44, on gfx942 94 of its 512.


def entries():
    """The AOT lists of all kernel files."""
    names = sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if p.stem not in ("__init__", "bench"))
    return [entry for name in names for entry in importlib.import_module(f"kernels.{name}").AOT]


def compile_entry(kernel, types, consts, target):
    """Compile as a launch on aligned memory would: pointers and sizes divisible by 16."""
    import triton
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in consts else types[name] for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind != "constexpr"]
    source = ASTSource(kernel, signature, consts, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=target)


def resources(compiled, target, cuobjdump):
    """Registers and bytes of stack per thread; a stack other than zero is a spill."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        patterns = dict(registers=r"\.vgpr_count:\s+(\d+)", stack=r"\.private_segment_fixed_size:\s+(\d+)")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [cuobjdump, "--dump-resource-usage", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        patterns = dict(registers=r"\bREG:(\d+)", stack=r"\bSTACK:(\d+)")
    return {key: int(re.search(pattern, text)[1]) for key, pattern in patterns.items()}


def main():
    import triton
    from triton.backends.compiler import GPUTarget

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for name, target in ((name, GPUTarget(*about)) for name, about in TARGETS.items()):
        if target.backend == "cuda" and not cuobjdump.exists():
            continue
        for kernel, types, consts in entries():
            usage = resources(compile_entry(kernel, types, consts, target), target, cuobjdump)
            print(json.dumps(dict(target=name, kernel=kernel.__name__, consts=str(consts), **usage)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each entry takes on each target."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_without_spills(measured, name):
    found = [entry for entry in measured if entry["target"] == name]
    if not found and TARGETS[name][0] == "cuda":
        pytest.skip("this triton ships no cuobjdump")
    assert len(found) == len(entries())
    for entry in found:
        assert entry["stack"] == 0, entry
        assert entry["registers"] <= REGISTERS.get(entry["kernel"], 64), entry


if __name__ == "__main__":
    main()
