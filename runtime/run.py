"""One stage's run: its folder, its steps, its checkpoints, its log, its optimizer update.

A run folder holds run.json (settings, command, commit, versions, device), metrics.jsonl (one object a line) and
checkpoint.safetensors (weights, average, optimizer state; step, settings, checksum in its header). The checkpoint
before it stays as checkpoint-STEP.safetensors. No pickle anywhere. To resume, run the same command again.
A failure on one rank ends all: the first to fail prints its line, the others leave when they miss it.
"""
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
import transformers
from tqdm import tqdm

from kernels import send
from runtime.config import UserError
from runtime.files import finite_json, read_checked, read_log, sync, write_json, write_rows, write_tensors
from runtime.optimizers import load_state_tensors, state_tensors
from runtime.ranks import (
    Draw,
    add_over_ranks,
    average_over_ranks,
    combine_numbers,
    gather_tensor,
    generator,
    is_spread,
    local_part,
    rank,
    read_numbers,
    world,
)

CHECKPOINT = "checkpoint.safetensors"


class NotFinite(FloatingPointError):
    """A loss, gradient, reward or map that is not finite, at `step` of a run; text "": another process tells which."""

    def __init__(self, step, text):
        super().__init__(text)
        self.step = step


@functools.cache
def commit():
    """Of the code that runs: 40 digits, with -dirty when files were changed; "unknown" without a repository or git."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
                               "--abbrev=40", "--exclude=*"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def about():
    """Where numbers come from: command, commit, versions, device."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"
    module = getattr(sys.modules["__main__"], "__spec__", None)                 # of python -m MODULE
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    return dict(command=" ".join([program, *sys.argv[1:]]), commit=commit(),
                python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                numpy=numpy.__version__, device=gpu, processes=str(world()), threads=str(torch.get_num_threads()))


class Run:
    """One stage's folder, log and checkpoints.

    folder    Path;  settings  dict that must not change between a run and its resumption
    modules   dict name -> nn.Module whose weights belong to the checkpoint;  opts  from `optimizers`
    keep      how many checkpoints stay on the disk
    .where    names of the photos of this rank's step, for messages
    """

    active = None                 # the run whose loop is under way: SIGTERM lets it finish its step and save
    writing = None                # Future of the checkpoint that is being written
    suspect = None                # step that the loop takes under torch's anomaly detection (--detect-anomaly)

    def __init__(self, folder, settings, seed, n_steps, modules, opts, save_every=100, keep=2):
        self.folder = Path(folder)
        self.settings = settings
        self.seed = seed
        self.n_steps = n_steps
        self.modules = modules
        self.opts = opts
        self.save_every = save_every
        self.keep = keep
        self.where = ()
        self.step = 0
        self.stop = False             # this process got SIGTERM
        self.stopping = False         # all processes agree to stop after this step
        self.ended = False            # the run ends before its last step: set by who watches it
        self.problem = ""
        self.noted = []               # (values, most, text, photos) that `bound` has not read yet
        self.folder.mkdir(parents=True, exist_ok=True)
        self.newest = None                                                      # step of a complete CHECKPOINT
        Run.finish_writing()                                                    # of a run that stopped
        self.start = self.done = self._restore()
        seen = combine_numbers(dict(step_min=self.start, step_max=self.start))
        if seen["step_min"] != seen["step_max"]:
            raise UserError(f"{self.folder}: processes found checkpoints of steps {seen['step_min']:.0f} and "
                            f"{seen['step_max']:.0f}; want --out on a disk that all of them share")
        if rank() == 0:
            self._tidy()
        self.began = time.time()

    def _tidy(self):
        """Drop what a killed run left behind and rows later than the checkpoint; describe a new run."""
        for part in self.folder.glob("*.part"):
            part.unlink(missing_ok=True)
        if self.start == 0:
            (self.folder / "best.json").unlink(missing_ok=True)
            write_json(self.folder / "run.json", dict(settings=self.settings, seed=self.seed, **about()))
        log = self.folder / "metrics.jsonl"
        if self.start < self.n_steps:
            write_rows(log, [row for row in read_log(log) if row["step"] < self.start])

    def checkpoints(self):
        """Checkpoints in the folder, newest first."""
        return [p for p in (self.folder / CHECKPOINT,) if p.exists()] + sorted(
            self.folder.glob("checkpoint-*.safetensors"), reverse=True)

    def _restore(self):
        found = self.checkpoints()
        damage = ""
        for path in found:
            try:
                flat, header = read_checked(path)
            except ValueError as error:
                damage = damage or str(error)
                if rank() == 0:
                    print(f"{error}; looking for the one before it", file=sys.stderr, flush=True)
                continue
            self._accept(json.loads(header["settings"]) | {"seed": int(header["seed"])})
            load_state_tensors(flat, self.modules, self.opts)
            self.newest = int(header["step"]) if path.name == CHECKPOINT else None
            return int(header["step"])
        if found:
            raise UserError(f"{damage}; no complete checkpoint is left: delete it to start this stage again")
        return 0

    def _accept(self, old):
        """Refuse a checkpoint of other settings."""
        new = self.settings | {"seed": self.seed}
        changed = [f"{k} {old.get(k)} -> {new.get(k)}"
                   for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if changed:
            raise UserError(f"{self.folder} holds a run with other settings ({', '.join(changed[:4])}); "
                            "use another --out, or delete that folder")

    @property
    def has_steps(self):
        """Whether steps are left to take."""
        return self.start < self.n_steps and not self.ended

    @property
    def is_complete(self):
        """Whether the result is there: the last step has been taken, or the run was ended before it."""
        return self.done >= self.n_steps or self.ended

    def rng(self, step, stream=0):
        """Generator of a step, the same on every rank (see ranks.Draw) and after a resume."""
        return generator(self.seed, stream, 0, step)

    def steps(self, label, stop_at=0, stream=0, batch=1):
        """Yield the remaining steps, each with the random numbers of its whole batch, and save as they pass.

        stop_at  stop after so many steps as if interrupted; 0: never
        stream   number of this stage's stream of random numbers;  batch  photos of a step over all ranks
        yields   (step, Draw)
        raises   SystemExit(0) after a SIGTERM, when the step under way is done and saved
        """
        if self.ended:
            return
        end = min(self.n_steps, stop_at) if stop_at else self.n_steps
        if self.start >= self.n_steps and rank() == 0:
            print(f"{label}: complete ({self.n_steps} steps in {self.folder})", flush=True)
        self.bar = tqdm(range(self.start, end), initial=self.start, total=end, desc=label, unit="step",
                        disable=rank() > 0 or self.start >= end, mininterval=1.0)
        Run.active = self
        try:
            for step in self.bar:
                self.step = step
                torch.autograd.set_detect_anomaly(step == Run.suspect)
                self.step_began = time.perf_counter()
                yield step, Draw(self.rng(step, stream), batch)
                self.done = step + 1
                if Run.writing and Run.writing.done():
                    Run.finish_writing()                                        # a full disk is told now
                self.stopping = self.stopping or (world() == 1 and self.stop)
                if self.done % self.save_every == 0 or self.done == end or self.stopping or self.ended:
                    self.save(self.done)
                if self.ended:
                    return
                if self.stopping:
                    if rank() == 0:
                        print(f"{label}: stopped by SIGTERM after {self.done} of {self.n_steps} steps, saved in "
                              f"{self.folder}; the same command goes on", file=sys.stderr, flush=True)
                    raise SystemExit(0)
        finally:
            Run.active = None
            torch.autograd.set_detect_anomaly(False)
            Run.finish_writing()

    def begin_result(self, last_file=""):
        """Whether this process is to write the result of the run: rank 0, once the last step has been taken.

        last_file  the file that is written last. It is removed here, so an interrupted write is not mistaken for a
                   result; where it exists already and no step was taken now, nothing is to be written
        """
        if rank() > 0 or self.done < self.n_steps:
            return False
        mark = self.folder / last_file
        if last_file and self.start >= self.n_steps and mark.exists():
            return False
        if last_file:
            mark.unlink(missing_ok=True)
        return True

    def save(self, step):
        """Copy the state of `step` finished steps and write it beside the steps that follow (`finish_writing`)."""
        if rank() > 0 and not any(is_spread(p) for m in self.modules.values() for p in m.parameters()):
            return
        Run.finish_writing()
        flat = state_tensors(self.modules, self.opts, wanted=rank() == 0)
        if rank() == 0:
            pool = ThreadPoolExecutor(1)
            header = dict(step=str(step), seed=str(self.seed), settings=json.dumps(self.settings), **about())
            Run.writing = pool.submit(self._write, flat, step, header)
            pool.shutdown(wait=False)

    def _write(self, flat, step, header):
        """Write a checkpoint; the one before it stays under the name of its own step."""
        log = self.folder / "metrics.jsonl"
        path = self.folder / CHECKPOINT
        if log.exists():
            sync(log)
        if self.newest is not None and self.newest != step and self.keep > 1:
            os.replace(path, self.folder / f"checkpoint-{self.newest:08d}.safetensors")
        write_tensors(path, flat, **header)
        self.newest = step
        for old in self.checkpoints()[self.keep:]:
            old.unlink(missing_ok=True)

    @staticmethod
    def finish_writing():
        """Wait for the checkpoint that is being written. raises OSError: it could not be written."""
        writing, Run.writing = Run.writing, None
        if writing:
            writing.result()

    def _describe(self, text, where=None):
        where = self.where if where is None else where
        shown = ", ".join(map(str, where[:8])) + (", ..." if len(where) > 8 else "")
        return (f"{self.folder.name}: step {self.step}: {text}{f' (photos: {shown})' if shown else ''}; "
                "nothing was updated")

    def bound(self, values, most, text):
        """Stop all ranks unless all of `values` (n,) lie in -most .. most. raises NotFinite.

        On a CPU they are read here, on a GPU at the next `update`, in the one wait of the step; several ranks stop
        there.
        text  of the message, {} the first value outside; where n is the number of the step's photos, those are named
        """
        self.noted.append((values.detach().flatten(), most, text, self.where))
        if not values.is_cuda:
            self._read()

    def _read(self, *norms):
        """Numbers of 0-dim tensors; in the same wait what was noted by `bound`: the first outside is the problem."""
        noted = self.noted
        self.noted = []
        parts = [*(n.detach().flatten() for n in norms), *(values for values, *_ in noted)]
        read = torch.cat(parts).tolist() if parts else []
        at = len(norms)
        for values, most, text, where in noted:
            found = read[at:at + len(values)]
            at += len(values)
            bad = [i for i, x in enumerate(found) if not -most <= x <= most]
            if bad and not self.problem:                                        # the first stays
                where = [where[i] for i in bad] if len(where) == len(found) else where
                self.problem = self._describe(text.format(found[bad[0]]), where)
        if self.problem and world() == 1:
            problem, self.problem = self.problem, ""
            raise NotFinite(self.step, problem)
        return read[:len(norms)]

    def check(self, **kinds):
        """Name the first value that is not finite, and its photos, as `bound` does. raises NotFinite.

        kinds  such as map=dict modality -> (B, ...): "depth map is not finite"
        """
        for kind, found in kinds.items():
            for name, x in found.items():
                self.bound(~x.detach().flatten(1).isfinite().all(1), 0, f"{name} {kind} is not finite")

    def backward(self, loss):
        """Add the gradient of a scalar to what has been gathered since the last update. raises NotFinite."""
        if self.step == Run.suspect:
            loss.backward()                                                     # names the operation
        self.bound(loss, sys.float_info.max, "loss is {}, lower the learning rate")
        if self.step != Run.suspect:
            loss.backward()

    def _name(self, param):
        return next((f"{name}/{k.replace('|', '.')}" for name, module in self.modules.items()
                     for k, p in module.named_parameters() if p is param), "a parameter")

    def _average(self, params):
        """Average gradients over ranks, those that a rank has not as zeros; agree on stopping. raises NotFinite."""
        own = [p for p in params if p.grad is not None]
        sizes = self._read(*([torch.nn.utils.get_total_norm([local_part(p.grad) for p in own])] if own else []))
        if not all(map(math.isfinite, sizes)):                                  # here it is still known whose it is
            self.problem = self.problem or self._describe_gradient(own)
        state = torch.tensor([*(p.grad is not None for p in params), self.stop, bool(self.problem)],
                             dtype=torch.float32)
        state = send(state, params[0].device)
        add_over_ranks(state)
        *used, stop, problem = (state > 0).tolist()
        if problem:
            raise NotFinite(self.step, self.problem)
        self.stopping = stop
        moved = [p for p, needed in zip(params, used, strict=True) if needed and not is_spread(p)]
        for p in moved:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        average_over_ranks([p.grad for p in moved])

    def _describe_gradient(self, params):
        """What is wrong with gradients of which one is not finite."""
        bad = next((p for p in params if p.grad is not None and not local_part(p.grad).isfinite().all()), None)
        return self._describe(f"gradient of {self._name(bad)} is not finite")

    def update(self, loss, params, factor, clip=1.0):
        """Backward, average the gathered gradients over ranks, clip each parameter list by its own norm, step, clear.

        loss    scalar with gradient, or None when `backward` has gathered all there is
        params  list of parameter lists;  factor  share of the peak learning rates
        returns float: largest gradient norm before clipping
        raises  NotFinite naming what was not finite; nothing is updated then
        """
        if loss is not None:
            self.backward(loss)
        every = [p for group in params for p in group]
        if world() > 1:
            self._average(every)
        norms = [gather_tensor(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
                 for group in params]
        norms = [n.to(every[0].device) for n in norms]                          # an empty list's lies on the CPU
        sizes = self._read(*norms)
        if not all(map(math.isfinite, sizes)):
            raise NotFinite(self.step, self._describe_gradient(every))
        for group, norm in zip(params, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(group, clip, norm)
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = factor * group["peak"]
            opt.step()
            opt.zero_grad(set_to_none=True)
        return max(sizes)

    @property
    def seconds(self):
        """Time since the step under way began."""
        return time.perf_counter() - self.step_began

    def log(self, step, values, show=(), **own):
        """Append one JSON object to metrics.jsonl and show the values named in `show` beside the bar (rank 0).

        values  dict name -> number or 0-dim tensor, combined over the ranks;  own  of rank 0 alone
        """
        values = combine_numbers(values)
        if rank() > 0:
            return
        row = read_numbers({**values, **own})
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(finite_json(dict(step=step, seconds=round(time.time() - self.began, 2), **row)),
                               allow_nan=False) + "\n")
        self.bar.set_postfix_str("  ".join(f"{k} {row[k]:.3g}" for k in show if k in row), refresh=False)
