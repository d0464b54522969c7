"""What every command line shares: errors that have a remedy become one line, SIGTERM stops a run after its step.

A bug keeps its traceback, and so does everything under REASONX_TRACEBACK=1. A character that the console does not have
is printed as its number.
"""
import os
import re
import signal
import sys

import torch
from safetensors import SafetensorError

from runtime.config import UserError
from runtime.files import FULL, LOCKED, one_line, system_error
from runtime.ranks import is_first_to_fail, is_joined, is_lost_peer, shutdown
from runtime.run import NotFinite, Run


def error_line(error):
    """What to print of an error that has a remedy, in one line; "" for a bug, which keeps its traceback."""
    text = " ".join(str(error).split())
    compiler = _compiler_error(error)
    if compiler:
        return (f"--compile: got no compiler ({compiler}), want one that torch.compile can call: C++ on a CPU, C for a "
                "GPU; install g++, or name one in the variable CXX (CC), or leave --compile out")
    error = system_error(error) or error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        asked = re.search(r"(?:tried to allocate|Tried to allocate) ([\d.]+ \w+)", text)
        return (f"out of memory{f' ({asked[1]} more were wanted)' if asked else ''}; what is on the disk is whole; "
                "take less at once: --micro, --checkpointing, --lora, a smaller batch or --size")
    if isinstance(error, OSError) and error.errno in FULL:
        return (f"{error.filename or 'a file'}: {error.strerror}; what is on the disk is whole; "
                "make room and run the same command again")
    if isinstance(error, OSError) and error.errno in LOCKED:
        return f"{error.filename}: {error.strerror}; want a folder that can be written: check --out"
    if isinstance(error, OSError) and error.filename is not None and error.errno:
        return f"{error.filename}: {error.strerror}"
    known = (UserError, ValueError, FloatingPointError, FileNotFoundError, NotADirectoryError, IsADirectoryError,
             PermissionError)
    return text if isinstance(error, known) else ""


def _compiler_error(error):
    """What torch.compile, or Triton under it, says of a compiler that is missing or cannot be called; "" otherwise.

    Their errors lie inside others, of torch's own kinds
    """
    from_compile = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
    while error is not None:
        if re.search(r"No working C\+\+ compiler|Failed to find C compiler|InvalidCxxCompiler", str(error)) or (
                from_compile and isinstance(error, OSError)):
            return one_line(error)
        error = error.__cause__ or error.__context__
    return ""


def escape_characters():
    """Let stdout and stderr print what their encoding lacks (a name in Cyrillic, a cp1252 console) as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave(code):
    """Exit at once when others may be waiting: a lost connection wakes them. raises SystemExit otherwise."""
    if is_joined() and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


def _on_sigterm(*_):
    if Run.active is None:
        print("stopped by SIGTERM; the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(0)
    Run.active.stop = True


def run_command(main, name, resumes=False):
    """Run a command line: errors with a remedy become one line on stderr and exit code 2, bugs keep their traceback.

    resumes  SIGTERM ends with 0: a loop first finishes and saves its step, anything else stops where it is
    """
    before = signal.signal(signal.SIGTERM, _on_sigterm) if resumes else None
    escape_characters()
    try:
        main()
        shutdown()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError, ValueError, ArithmeticError, MemoryError, RuntimeError,
            SafetensorError) as error:
        text = error_line(error)
        if is_lost_peer(error):
            text = "another process was lost; the same command resumes from the last checkpoint"
        is_told = isinstance(error, NotFinite) and not text                     # by another process
        if (not text and not is_told) or os.environ.get("REASONX_TRACEBACK"):
            raise
        if not is_told and is_first_to_fail():
            print(text if text.startswith(f"{name}: ") else f"{name}: {text}", file=sys.stderr, flush=True)
        _leave(2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def run_stage(stage, cfg, device):
    """Run stage(cfg, device). With --detect-anomaly a step that is not finite is repeated.

    The repetition starts from the checkpoint before that step, under torch's anomaly detection, which names the
    operation. raises run.NotFinite, RuntimeError (torch's).
    """
    try:
        return stage(cfg, device)
    except NotFinite as error:
        if not cfg.detect_anomaly:
            raise
        print(f"train.py: {error or 'another process stopped'}; repeating step {error.step} to find the operation",
              file=sys.stderr, flush=True)
        Run.suspect = error.step
    try:                                                                        # here the first run's memory is free
        return stage(cfg, device)
    finally:
        Run.suspect = None
