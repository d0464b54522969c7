"""Every launch of the benchmark's cases compiles for each GPU target, no GPU needed, and stays what it was.

Signatures are those of real calls: what kernels.launch receives is recorded, then specialised as Triton does.
Run as a script (`python tests/test_aot.py`) it compiles for all targets and prints a JSON line for each: a process of
its own, since under TRITON_INTERPRET a kernel cannot be compiled. With `--write` it records the counts.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
RECORD = Path(__file__).parent / "fixtures" / "aot.json"      # registers, 16-byte accesses, instructions of each launch
PLAY = 1.1                        # another version of Triton may take so many times the instructions and registers
CUT = 4                           # the benchmark's sizes are divided by it: still divisible by 16 where they are
KINDS = ("step of paper", "step of small", "channels_last", "odd")      # of a case, by its label
PATTERNS = {
    "cuda": dict(registers=r"\bREG:(\d+)", stack=r"\bSTACK:(\d+)", wide=r"\b(?:LDG|STG)\.E\S*\.128",
                 instructions=r"^\s+/\*[0-9a-f]{4,}\*/\s+\S"),
    "hip": dict(registers=r"\.vgpr_count:\s+(\d+)", stack=r"\.private_segment_fixed_size:\s+(\d+)",
                wide=r"\b(?:global|buffer)_(?:load|store)_dwordx4", instructions=r"^\t(?:s|v|global|buffer|ds|flat)_"),
}


def record_calls():
    """name -> (kernel, arguments, constants) of every launch that the benchmark's cases and other rewards make."""
    sys.path.insert(0, str(ROOT))
    import torch

    import kernels
    calls = {}
    label = ""

    def record(kernel, grid, *args, **constants):
        shown = {k: v for k, v in constants.items() if k in ("RULE", "FORM", "WINDOW", "C", "DRAWS", "FLAT", "LAST")}
        name = " ".join((label, kernel.__name__, *(f"{k}={v}" for k, v in shown.items())))
        calls.setdefault(name, (kernel, args, constants))

    kernels.launch = record                                   # before the kernels' files take them by name
    kernels.uses_triton = lambda tensor: True
    kernels.uses_triton_with_floats = lambda tensor: True
    from bench import kernels as bench
    for make in bench.OPS.values():
        for case in filter(lambda case: case.recorded, make(torch.device("cpu"), CUT)):
            label = next((word for word in KINDS if word in case.label), "even")
            bench.bind(case, case.kernel)()
            if "large, depth" in case.label:                  # other rewards, a window, a relation that is wanted
                pred, pts, prob, weight = case.args[:4]
                case.kernel(pred, pts, prob, weight, "depth", "hard", 0.1, 1, True)
                case.kernel(pred.expand(-1, -1, 3, -1, -1), pts, prob, weight, "normal", "brier", 0.1, 0)
    return calls


def compile_call(kernel, args, constants, target):
    """Compile as this launch would on a target."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants = constants | dict(debug=False)
    bound, specialization, options = binder(*args, **constants)
    options, signature, constexprs, attrs = kernel._pack_args(backend, constants, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def resources(compiled, target, tools):
    """Registers and bytes of stack per thread (a stack is a spill); 16-byte accesses and instructions of the code."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            say = dict(capture_output=True, text=True, check=True)
            usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin.name], **say).stdout
            code = subprocess.run([tools / "nvdisasm", "-c", cubin.name], **say).stdout
            text = usage + "\n" + "\n".join(line for line in code.splitlines() if " NOP" not in line)
    found = PATTERNS[target.backend]
    return {**{k: int(re.search(found[k], text)[1]) for k in ("registers", "stack")},
            **{k: len(re.findall(found[k], text, re.M)) for k in ("wide", "instructions")}}


def main():
    import triton
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    calls = record_calls()
    record = {}
    for name, target in ((name, GPUTarget(*about)) for name, about in TARGETS.items()):
        if target.backend == "cuda" and not (tools / "nvdisasm").exists():
            continue
        for call, about in calls.items():
            usage = resources(compile_call(*about, target), target, tools)
            record.setdefault(call, {})[name] = usage
            print(json.dumps(dict(target=name, call=call, **usage)), flush=True)
    if "--write" in sys.argv:
        RECORD.write_text(json.dumps(dict(triton=triton.__version__, calls=record), indent=1) + "\n")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each launch takes on each target."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_without_spills_and_keep_their_counts(measured, name):
    found = {entry["call"]: entry for entry in measured if entry["target"] == name}
    if not found and TARGETS[name][0] == "cuda":
        pytest.skip("this triton ships no disassembler")
    record = {call: of[name] for call, of in json.loads(RECORD.read_text())["calls"].items()}
    assert found.keys() == record.keys()
    for call, entry in found.items():
        assert entry["stack"] == 0, entry
        assert entry["wide"] >= record[call]["wide"], (entry, record[call])
        for count in ("registers", "instructions"):
            assert entry[count] <= PLAY * record[call][count], (entry, record[call])


if __name__ == "__main__":
    main()
