"""The side of faults.py that runs in a forked process: the commands, imported once, and the ways they can be hurt."""
import importlib
import os
import signal
import sys
import threading

import torch
from tqdm import tqdm

import eval  # noqa: A004, F401  imported before the fork, for speed
import judge  # noqa: F401
import train  # noqa: F401
from runtime.command import run_command
from runtime.ranks import rank as rank_of
from runtime.run import Run

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())                                                # its own would outlive a killed process


def die_at_write(n, after):
    """SIGKILL this process when its n-th file gets its name, or right after."""
    real, count = os.replace, [0]

    def replace(a, b):
        count[0] += 1
        if count[0] == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(a, b)
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace


def poison(step, rank):
    """At a step, on a rank, the loss that is handed to the run is not a number."""
    real = Run.backward

    def backward(self, loss):
        real(self, loss * float("nan") if (self.step, rank_of()) == (step, rank) else loss)
    Run.backward = backward


def command(module, argv, log, env, die_at, after, nan_at):
    """Run MODULE.main(argv) as its command line would, output to a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")                             # a CPU's bits are compared
    torch.set_num_threads(torch.get_num_threads())      # a fork makes its own pool here, before its threads race to it
    sys.argv = [f"{module}.py", *argv]
    if die_at:
        die_at_write(die_at, after)
    if nan_at:
        poison(*nan_at)
    run_command(lambda: importlib.import_module(module).main(argv), f"{module}.py", resumes=module == "train")
