"""What every stage needs around its loop: ranks, per-step randomness, run folder, checkpoints, log lines.

A run folder holds run.json (settings, command, commit, versions, device), metrics.jsonl (one object a line) and
checkpoint.safetensors (weights, EMA, optimizer state; step, settings, checksum in its header), before it
checkpoint-STEP.safetensors. No pickle anywhere. To resume, run the same command again.

ranks    every rank draws the random numbers of the whole batch and takes its `share`; `average` makes a batch statistic
         of one rank that of all; `Run.update` averages gradients. So any number of processes takes the same steps
failure  on one rank ends all: the first to fail prints its line, the others leave when they miss it
The only file that touches torch.distributed.
"""
import copy
import functools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from files import (
    FULL,
    LOCKED,
    finite_json,
    read_checked,
    read_log,
    sync,
    system_error,
    write_json,
    write_tensors,
    write_text,
)

CHECKPOINT = "checkpoint.safetensors"
PATIENCE = timedelta(hours=1)     # for a rank that is busy alone (evaluation, bank); a dead one is noticed at once


class UserError(Exception):
    """A mistake the user can mend; commands print it as one line and exit with 2."""


class NotFinite(FloatingPointError):
    """A loss, gradient, reward or map that is not finite, at `step` of a run; text "": another process tells which."""

    def __init__(self, step, text):
        super().__init__(text)
        self.step = step


def rank():
    """Number of this process, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes share the batch."""
    return int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name, command):
    """torch.device of a --device flag: auto, cpu or cuda. raises UserError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{command}: got --device cuda, but torch finds no GPU; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def setup(cfg):
    """Join the process group when started by torchrun, choose threads and device; returns the torch.device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cfg.fsdp and world() == 1:
        raise UserError("train.py: --fsdp 1 with one process: it spreads the policy over those of torchrun "
                        "--nproc_per_node=N")
    use_cuda = pick_device(cfg.device, "train.py").type == "cuda"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    elif world() > 1 and not use_cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if use_cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"train.py: process {local} of this machine has no GPU of its own (there are "
                            f"{torch.cuda.device_count()}); use --nproc_per_node={torch.cuda.device_count()}, or "
                            "--device cpu")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("highest" if cfg.precision == "fp32" else "high")    # TF32 outside autocast
    if world() > 1 and not dist.is_initialized():
        _join("nccl" if use_cuda else "gloo")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                 # without it cuBLAS refuses to be exact
    torch.use_deterministic_algorithms(bool(cfg.deterministic))
    return torch.device("cuda", local) if use_cuda else torch.device("cpu")


def _join(backend):
    """Enter the process group. torchrun keeps one store over its restarts on a node, where the addresses of processes
    that are gone would be found: each attempt has its own part of it. Several nodes count attempts each for itself."""
    store, r, n = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=r, world_size=n, timeout=PATIENCE)


def in_bf16(precision, device):
    """Whether the networks multiply in bf16: precision "bf16", or "auto" where the hardware has it."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else \
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return precision == "bf16" or (precision == "auto" and native)


def autocast(precision, device, cache=True):
    """Context for the networks' forward passes: bf16 products where the hardware has them ("auto"), "bf16" or "fp32".

    cache  keep the 16-bit copies of the weights until the context ends: faster, but half the weights more in memory
    Likelihoods, losses and weights stay fp32. A CPU without bf16 instructions runs fp32, about half as fast.
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache, enabled=in_bf16(precision, device))


def multiplying(network):
    """The layers of a network whose weights autocast casts."""
    return [m for m in network.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]


def halve(network):
    """Keep in bf16 the weights that autocast would cast at every call, in place: the same bits, half the memory."""
    for m in multiplying(network):
        m.to(torch.bfloat16)


def barrier():
    """Wait for all ranks (nothing to do for one process)."""
    if world() > 1:
        dist.barrier()


def share(x, dim=0):
    """This rank's part of a tensor that every rank has drawn for the whole batch along `dim`."""
    return x.chunk(world(), dim)[rank()]


def average(x):
    """Mean over ranks of a tensor without gradient: with it, what one rank knows of its rows becomes what all know."""
    if world() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= world()
    return x


def shared(values):
    """Numbers to log, by the same names on each rank: their mean over ranks; least for _min, greatest for _max."""
    if world() == 1:
        return values
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"        # what it can send
    mine = torch.tensor([*numbers(values).values()], dtype=torch.float64, device=device)
    each = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(each, mine)
    each = torch.stack(each)                                                    # (ranks, values)
    ends = dict(_min=each.amin(0), _max=each.amax(0))
    return {k: ends.get(k[-4:], each.mean(0))[i].item() for i, k in enumerate(values)}


def shard(module, device, methods=()):
    """Spread a network's weights over ranks (FSDP2): each holds a part on `device` and gathers one layer at a time.

    methods  names of methods other than forward that use the weights
    """
    mesh = init_device_mesh(device.type, (world(),))
    for layer in (*_layers(module), module):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for name in methods:
        register_fsdp_forward_method(module, name)


def _layers(module):
    """The outermost members of module lists that are called as a whole."""
    for child in module.children():
        if isinstance(module, torch.nn.ModuleList) and type(child).forward is not torch.nn.Module.forward:
            yield child
        else:
            yield from _layers(child)


def whole(x):
    """A tensor as it is, or gathered from all ranks when it is spread (then all ranks call)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _part(x):
    """The part of a tensor that this rank holds: the tensor itself, unless it is spread."""
    return x.to_local() if isinstance(x, DTensor) else x


def _spread(value, like):
    """A whole tensor in the form of `like`: spread over ranks, or with its strides, as fused AdamW wants them."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def shutdown():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def generator(*key):
    """A CPU generator seeded by any integers: same key, same numbers, on every machine."""
    seed = 0x9E3779B97F4A7C15
    for k in key:                                                               # splitmix64 over the key
        seed = (seed + int(k) * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        seed ^= seed >> 31
    return torch.Generator().manual_seed(seed >> 1)


def on_device(rng, device):
    """Generator to draw from on a device: `rng` itself on a CPU; on a GPU one there, seeded by a number drawn from rng.

    So a GPU's numbers too are the same on every rank and after a resume. They differ from a CPU's.
    """
    if torch.device(device).type == "cpu":
        return rng
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,), generator=rng)))


def normal(shape, rng, device):
    """Standard normal numbers on a device, drawn there (see on_device): millions a step are slow on a CPU."""
    rng = on_device(rng, device)
    return torch.randn(shape, generator=rng, device=rng.device)


def numbers(values):
    """A dict of numbers and 0-dim tensors as floats; a GPU is waited for once, not once a value."""
    tensors = {k: v.detach().double() for k, v in values.items() if isinstance(v, torch.Tensor)}
    read = torch.stack(list(tensors.values())).tolist() if tensors else ()
    return {**values, **dict(zip(tensors, read, strict=True))}


def cosine(step, steps, warmup=0):
    """Learning-rate factor: linear warm-up, then cosine from 1 to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


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
    return dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), commit=commit(),
                python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                numpy=numpy.__version__, device=gpu, processes=str(world()), threads=str(torch.get_num_threads()))


def trained(module, like=None):
    """The parameters of a module that train (in `like`, if given), as a module that shares them: what a run keeps."""
    names = [name for name, p in (like or module).named_parameters() if p.requires_grad]
    own = dict(module.named_parameters())
    return torch.nn.ParameterDict({name.replace(".", "|"): own[name] for name in names})


def frozen_copy(module):
    """A frozen deep copy that shares the parameters which are frozen already."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared).requires_grad_(False)


def follow(copies, params):
    """Copy parameters into those of another network, rounded to their dtype."""
    with torch.no_grad():
        for c, p in zip(copies, params, strict=True):
            c.copy_(p)


def optimizers(modules, lr, muon, weight_decay, betas=(0.9, 0.98)):
    """AdamW for everything, or, with `muon` (its learning rate) > 0, Muon for the weights of hidden linear layers.

    modules  list of nn.Module; embeddings, convolutions, biases, output layers (names in head, dense) stay with AdamW
    differs: the paper uses AdamW throughout; training from scratch on a CPU, Muon needs about half as many photos.
    """
    hidden = {id(m.weight) for module in modules for name, m in module.named_modules()
              if muon and isinstance(m, torch.nn.Linear) and not name.endswith(("head", "dense"))}
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices, rest = [p for p in params if id(p) in hidden], [p for p in params if id(p) not in hidden]
    fused = all(p.is_cuda for p in rest)                                        # needs no copy of the parameters
    chosen = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused or None)]
    if matrices:
        chosen.append(torch.optim.Muon(matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    for group in (g for one in chosen for g in one.param_groups):
        group["peak"] = group["lr"]
    return chosen


def pack(modules, opts, keep=True):
    """All tensors of a run by flat name: "policy/..." of modules (dict name -> nn.Module), "opt0/..." of optimizers.

    keep  False: only take part in gathering spread tensors
    """
    flat = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for n, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            flat |= {f"opt{n}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    packed = {}
    for k, v in flat.items():
        v = whole(v.detach())
        if keep:
            packed[k] = v.cpu().contiguous().clone()
    return packed


def unpack(flat, modules, opts):
    """Inverse of `pack`, in place."""
    for name, module in modules.items():
        module.load_state_dict({k: _spread(flat[f"{name}/{k}"], v) for k, v in module.state_dict().items()})
    for n, opt in enumerate(opts):
        params, state = [p for group in opt.param_groups for p in group["params"]], {}
        for key in (k for k in flat if k.startswith(f"opt{n}/")):
            _, index, k = key.split("/")
            state.setdefault(int(index), {})[k] = _spread(flat[key], params[int(index)])
        opt.load_state_dict(dict(opt.state_dict(), state=state))


class Run:
    """One stage's folder, log and checkpoints.

    folder    Path;  settings  dict that must not change between a run and its resumption
    modules   dict name -> nn.Module whose weights belong to the checkpoint;  opts  from `optimizers`
    keep      how many checkpoints stay on the disk
    .where    names of the photos of this rank's step, for messages
    """

    active = None                 # the run whose loop is under way: SIGTERM lets it finish its step and save
    suspect = None                # step that the loop takes under torch's anomaly detection (--detect-anomaly)

    def __init__(self, folder, settings, seed, steps, modules, opts, save_every=100, keep=2):
        self.folder, self.settings, self.seed, self.steps = Path(folder), settings, seed, steps
        self.modules, self.opts, self.save_every, self.keep = modules, opts, save_every, keep
        self.where, self.step, self.stop, self.stopping, self.problem = (), 0, False, False, ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.newest = None                                                      # step of a complete CHECKPOINT
        self.start = self.done = self._restore()
        seen = shared(dict(step_min=self.start, step_max=self.start))
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
        if self.start < self.steps:
            write_text(log, "".join(json.dumps(row) + "\n" for row in read_log(log) if row["step"] < self.start))

    def checkpoints(self):
        """Checkpoints in the folder, newest first."""
        return [p for p in (self.folder / CHECKPOINT,) if p.exists()] + sorted(
            self.folder.glob("checkpoint-*.safetensors"), reverse=True)

    def _restore(self):
        found, damage = self.checkpoints(), ""
        for path in found:
            try:
                flat, header = read_checked(path)
            except ValueError as error:
                damage = damage or str(error)
                if rank() == 0:
                    print(f"{error}; looking for the one before it", file=sys.stderr, flush=True)
                continue
            self._accept(json.loads(header["settings"]) | {"seed": int(header["seed"])})
            unpack(flat, self.modules, self.opts)
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

    def rng(self, step, stream=0):
        """Generator of a step, the same on every rank (see `share`) and after a resume."""
        return generator(self.seed, stream, 0, step)

    def loop(self, label, stop_at=0):
        """Yield the remaining steps under a progress bar, saving as they pass.

        raises  SystemExit(0) after a SIGTERM, when the step under way is done and saved
        """
        end = min(self.steps, stop_at) if stop_at else self.steps
        if self.start >= self.steps and rank() == 0:
            print(f"{label}: complete ({self.steps} steps in {self.folder})", flush=True)
        self.bar = tqdm(range(self.start, end), initial=self.start, total=end, desc=label, unit="step",
                        disable=rank() > 0 or self.start >= end, mininterval=1.0)
        Run.active = self
        try:
            for step in self.bar:
                self.step = step
                torch.autograd.set_detect_anomaly(step == Run.suspect)
                yield step
                self.done = step + 1
                self.stopping = self.stopping or (world() == 1 and self.stop)
                if self.done % self.save_every == 0 or self.done == end or self.stopping:
                    self.save(self.done)
                if self.stopping:
                    if rank() == 0:
                        print(f"{label}: stopped by SIGTERM after {self.done} of {self.steps} steps, saved in "
                              f"{self.folder}; the same command goes on", file=sys.stderr, flush=True)
                    raise SystemExit(0)
        finally:
            Run.active = None
            torch.autograd.set_detect_anomaly(False)

    def finished(self, last_file=""):
        """True on rank 0 when the last step has been taken and its result, which ends with last_file, is to be written.

        last_file  "": write it again in any case; else it goes first, so that half a result is not taken for one
        """
        if rank() > 0 or self.done < self.steps:
            return False
        mark = self.folder / last_file
        if last_file and self.start >= self.steps and mark.exists():
            return False
        if last_file:
            mark.unlink(missing_ok=True)
        return True

    def save(self, step):
        """Write the checkpoint of `step` finished steps; the one before it stays under the name of its own step."""
        if rank() > 0 and not any(isinstance(p, DTensor) for m in self.modules.values() for p in m.parameters()):
            return
        flat = pack(self.modules, self.opts, keep=rank() == 0)
        if rank() > 0:
            return
        log, path = self.folder / "metrics.jsonl", self.folder / CHECKPOINT
        if log.exists():
            sync(log)
        if self.newest is not None and self.newest != step and self.keep > 1:
            os.replace(path, self.folder / f"checkpoint-{self.newest:08d}.safetensors")
        write_tensors(path, flat, step=str(step), seed=str(self.seed), settings=json.dumps(self.settings), **about())
        self.newest = step
        for old in self.checkpoints()[self.keep:]:
            old.unlink(missing_ok=True)

    def improves(self, figures):
        """Whether validation figures are the best of the run so far, by the mean of all pair accuracies."""
        best, score = self.folder / "best.json", _score(figures)
        return math.isfinite(score) and not (best.exists() and json.loads(best.read_text())["score"] >= score)

    def improved(self, step, figures):
        """Note that the best so far has been written (rank 0)."""
        if rank() == 0:
            write_json(self.folder / "best.json", dict(step=step, score=_score(figures), **figures))

    def _told(self, text):
        shown = ", ".join(map(str, self.where[:8])) + (", ..." if len(self.where) > 8 else "")
        return (f"{self.folder.name}: step {self.step}: {text}{f' (photos: {shown})' if shown else ''}; "
                "nothing was updated")

    def fail(self, text):
        """Stop all ranks, here when alone, else at the next `update`: none is left waiting. raises NotFinite."""
        self.problem = self.problem or self._told(text)
        if world() == 1:
            raise NotFinite(self.step, self.problem)

    def check(self, values):
        """Name the first of some values (name -> (B, ...)) that is not finite by its photos. raises NotFinite."""
        bad = torch.stack([~x.detach().flatten(1).isfinite().all(1) for x in values.values()]).tolist()  # one wait
        for what, rows in zip(values, bad, strict=True):
            if any(rows) and not self.problem:                                  # at several ranks the first stays
                self.where = [self.where[i] for i, row in enumerate(rows) if row]
                self.fail(f"{what} is not finite")

    def backward(self, loss):
        """Add the gradient of a scalar to what has been gathered since the last update. raises NotFinite."""
        if self.step == Run.suspect:
            loss.backward()                                                     # names the operation
        if not loss.isfinite():
            self.fail(f"loss is {loss.item()}, lower the learning rate")
        if self.step != Run.suspect:
            loss.backward()

    def _name(self, param):
        return next((f"{name}/{k.replace('|', '.')}" for name, module in self.modules.items()
                     for k, p in module.named_parameters() if p is param), "a parameter")

    def _gather(self, params):
        """Average gradients over ranks, those that a rank has not as zeros; agree on stopping. raises NotFinite."""
        bad = next((p for p in params if p.grad is not None and not _part(p.grad).isfinite().all()), None)
        if bad is not None:                                                     # here it is still known whose it is
            self.problem = self.problem or self._told(f"gradient of {self._name(bad)} is not finite")
        state = torch.tensor([*(p.grad is not None for p in params), self.stop, bool(self.problem)],
                             dtype=torch.float32, device=params[0].device)
        dist.all_reduce(state)
        *used, stop, problem = (state > 0).tolist()
        if problem:
            raise NotFinite(self.step, self.problem)
        self.stopping = stop
        moved = [p for p, needed in zip(params, used, strict=True) if needed and not isinstance(p, DTensor)]
        if moved:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in moved])
            dist.all_reduce(flat)
            for p, g in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
                p.grad = _spread((g / world()).view_as(p), p)

    def update(self, loss, params, factor, clip=1.0):
        """Backward, average the gathered gradients over ranks, clip each parameter list by its own norm, step, clear.

        loss    scalar with gradient, or None when `backward` has gathered all there is
        params  list of parameter lists;  factor  share of the peak learning rates
        returns float: largest gradient norm before clipping
        raises  NotFinite naming what was not finite; nothing is updated then
        """
        if loss is not None:
            self.backward(loss)
        if world() > 1:
            self._gather([p for group in params for p in group])
        norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
                 for group in params]
        sizes = torch.stack([n.to(params[0][0].device) for n in norms]).tolist()                # one wait
        if not all(map(math.isfinite, sizes)):
            bad = next((p for group in params for p in group
                        if p.grad is not None and not whole(p.grad).isfinite().all()), None)
            raise NotFinite(self.step, self._told(f"gradient of {self._name(bad)} is not finite"))
        for group, norm in zip(params, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(group, clip, norm)
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = factor * group["peak"]
            opt.step()
            opt.zero_grad(set_to_none=True)
        return max(sizes)

    def log(self, step, show=(), **values):
        """Append one JSON object to metrics.jsonl and show the values named in `show` beside the bar (rank 0)."""
        if rank() > 0:
            return
        row = numbers(values)
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(finite_json(dict(step=step, seconds=round(time.time() - self.began, 2), **row)),
                               allow_nan=False) + "\n")
        self.bar.set_postfix_str("  ".join(f"{k} {row[k]:.3g}" for k in show if k in row), refresh=False)


def _score(figures):
    values = [v for k, v in figures.items() if k.endswith("/pairs")]
    return sum(values) / len(values) if values else math.nan


def _line(error):
    """What to print of an error that has a remedy, in one line; "" for a bug, which keeps its traceback."""
    text, error = " ".join(str(error).split()), system_error(error) or error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        asked = re.search(r"(?:tried to allocate|Tried to allocate) ([\d.]+ \w+)", text)
        return (f"out of memory{f' ({asked[1]} more were wanted)' if asked else ''}; what is on the disk is whole; "
                "take less at once: --micro, --checkpointing 1, --lora, a smaller batch or --size")
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


def _is_peers(error):
    """Whether an error only says that another process has gone."""
    return world() > 1 and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error))


def _speaks(error):
    """Whether this process is the one to print: the first that fails, or the first of a node before ranks have met."""
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:                                                        # the process that kept count has gone
        return True


def _leave(code):
    """Exit at once when others may be waiting: a lost connection wakes them. raises SystemExit otherwise."""
    if dist.is_initialized() and code:
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
    try:
        main()
        shutdown()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError, ValueError, ArithmeticError, MemoryError, RuntimeError,
            SafetensorError) as error:
        text = _line(error)
        if _is_peers(error):
            text = "another process was lost; the same command resumes from the last checkpoint"
        told = isinstance(error, NotFinite) and not text
        if (not text and not told) or os.environ.get("REASONX_TRACEBACK"):
            raise
        if not told and _speaks(error):
            print(text if text.startswith(f"{name}: ") else f"{name}: {text}", file=sys.stderr, flush=True)
        _leave(2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def ema_update(average, model, decay):
    """Move the averaged weights toward the model's: average <- decay average + (1 - decay) model."""
    pairs = [(_part(a), _part(p)) for a, p in zip(average.parameters(), model.parameters(), strict=True)]
    get_ema_multi_avg_fn(decay)(*zip(*pairs, strict=True), None)                # few launches on a GPU
