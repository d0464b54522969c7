"""What every stage needs around its loop: ranks, per-step randomness, run folder, checkpoints, log lines.

A run folder holds run.json (settings, command, commit, versions, device), metrics.jsonl (one object a line) and
checkpoint.safetensors (weights, EMA, optimizer state; step and settings in its header). No pickle anywhere.
To resume, run the same command again. The only file that touches torch.distributed.
"""
import copy
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

CHECKPOINT = "checkpoint.safetensors"


class UserError(Exception):
    """A mistake the user can mend; commands print it as one line and exit with 2."""


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
    use_cuda = pick_device(cfg.device, "train.py").type == "cuda"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    elif world() > 1 and not use_cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
    if use_cuda:
        torch.cuda.set_device(local)
    return torch.device("cuda", local) if use_cuda else torch.device("cpu")


def autocast(precision, device, cache=True):
    """Context for the networks' forward passes: bf16 products where the hardware has them ("auto"), "bf16" or "fp32".

    cache  keep the 16-bit copies of the weights until the context ends: faster, but half the weights more in memory
    Likelihoods, losses and weights stay fp32. A CPU without bf16 instructions runs fp32, about half as fast.
    """
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else \
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache,
                          enabled=precision == "bf16" or (precision == "auto" and native))


def barrier():
    """Wait for all ranks (nothing to do for one process)."""
    if world() > 1:
        dist.barrier()


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


def cosine(step, steps, warmup=0):
    """Learning-rate factor: linear warm-up, then cosine from 1 to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def about():
    """Where numbers come from: command, commit, versions, device."""
    commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                            capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"
    return dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), commit=commit.stdout.strip() or "unknown",
                python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                numpy=numpy.__version__, device=gpu)


def hub_folder(name, patterns):
    """A local folder as it is, or the files of a hub id (ORG/NAME) that match `patterns`, downloaded to HF_HOME.

    raises  FileNotFoundError when it is neither
    """
    if Path(name).is_dir():
        return Path(name)
    reason = "not of the form ORG/NAME"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        try:
            return Path(snapshot_download(str(name), allow_patterns=patterns))
        except (OSError, ValueError) as error:                                  # no network, no such model, no access
            reason = " ".join(str(error).split())[:200]
    raise FileNotFoundError(f"got no folder {str(name)!r} here and no such model on the hub ({reason}); "
                            "want a folder, or a hub id and a network")


def weights_digest(name):
    """Short digest of the safetensors files under a folder or of a hub id's snapshot.

    A run may not resume on other weights than it began with.
    """
    folder, h = hub_folder(name, ["*.safetensors"]), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if path.name != CHECKPOINT:
            h.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as f:
                while block := f.read(1 << 24):
                    h.update(block)
    return h.hexdigest()[:16]


def load_strict(model, state, origin, assign=False):
    """load_state_dict that names the first missing, surplus or misshapen key. raises ValueError."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in state.items()}
    wrong = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    if wrong:
        k = wrong[0]
        raise ValueError(f"{len(wrong)} of {len(want)} weights in {origin} do not fit (first: {k}, "
                         f"got {got.get(k)}, want {want.get(k)}); use a checkpoint of the same architecture and size")
    model.load_state_dict(state, assign=assign)


def trained(module, like=None):
    """The parameters of a module that train (in `like`, if given), as a module that shares them: what a run keeps."""
    names = [name for name, p in (like or module).named_parameters() if p.requires_grad]
    own = dict(module.named_parameters())
    return torch.nn.ParameterDict({name.replace(".", "|"): own[name] for name in names})


def frozen_copy(module):
    """A frozen deep copy that shares the parameters which are frozen already."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared).requires_grad_(False)


def strict(value):
    """The value with non-finite floats as null, which JSON has and NaN it has not."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write strict JSON atomically."""
    path = Path(path)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    part.write_text(json.dumps(strict(value), indent=1, allow_nan=False))
    os.replace(part, path)


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


def pack(modules, opts):
    """All tensors of a run by flat name: "policy/..." of modules (dict name -> nn.Module), "opt0/..." of optimizers."""
    flat = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for n, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            flat |= {f"opt{n}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    return {k: v.detach().cpu().contiguous().clone() for k, v in flat.items()}


def unpack(flat, modules, opts):
    """Inverse of `pack`, in place."""
    for name, module in modules.items():
        module.load_state_dict({k[len(name) + 1:]: v for k, v in flat.items() if k.startswith(name + "/")})
    for n, opt in enumerate(opts):
        state = {}
        for key in (k for k in flat if k.startswith(f"opt{n}/")):
            _, index, k = key.split("/")
            state.setdefault(int(index), {})[k] = flat[key]
        opt.load_state_dict(dict(opt.state_dict(), state=state))


class Run:
    """One stage's folder, log and checkpoint.

    folder    Path;  settings  dict that must not change between a run and its resumption
    modules   dict name -> nn.Module whose weights belong to the checkpoint;  opts  from `optimizers`
    """

    def __init__(self, folder, settings, seed, steps, modules, opts, save_every=100):
        self.folder, self.settings, self.seed, self.steps = Path(folder), settings, seed, steps
        self.modules, self.opts, self.save_every = modules, opts, save_every
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start = self.done = self._restore()
        if rank() == 0 and self.start == 0:
            write_json(self.folder / "run.json", dict(settings=settings, seed=seed, **about()))
        if rank() == 0 and self.start < steps:                                  # drop rows later than the checkpoint
            log = self.folder / "metrics.jsonl"
            rows = log.read_text().splitlines() if log.exists() and self.start else []
            log.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] < self.start))
        self.began = time.time()

    def _restore(self):
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as f:
                header, flat = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: got an unreadable checkpoint ({error}); "
                            "delete it to start this stage again") from None
        old, new = json.loads(header["settings"]) | {"seed": int(header["seed"])}, self.settings | {"seed": self.seed}
        changed = [f"{k} {old.get(k)} -> {new.get(k)}"
                   for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if changed:
            raise UserError(f"{self.folder} holds a run with other settings ({', '.join(changed[:4])}); "
                            "use another --out, or delete that folder")
        unpack(flat, self.modules, self.opts)
        return int(header["step"])

    def rng(self, step, stream=0):
        """Generator of a step on this rank; the same after a resume."""
        return generator(self.seed, stream, rank(), step)

    def loop(self, label, stop_at=0):
        """Yield the remaining steps under a progress bar, saving as they pass."""
        end = min(self.steps, stop_at) if stop_at else self.steps
        if self.start >= self.steps and rank() == 0:
            print(f"{label}: complete ({self.steps} steps in {self.folder})", flush=True)
        bar = tqdm(range(self.start, end), initial=self.start, total=end, desc=label, unit="step",
                   disable=rank() > 0 or self.start >= end, mininterval=1.0)
        for step in bar:
            self.bar = bar
            yield step
            self.done = step + 1
            if (step + 1) % self.save_every == 0 or step + 1 == end:
                self.save(step + 1)

    def finished(self):
        """True on rank 0 when the last step has been taken."""
        return rank() == 0 and self.done >= self.steps

    def save(self, step):
        """Write the checkpoint of `step` finished steps: temporary name, fsync, rename."""
        if rank() > 0:
            return
        part = self.folder / f"{CHECKPOINT}.part"
        save_file(pack(self.modules, self.opts), part,
                  metadata=dict(step=str(step), seed=str(self.seed), settings=json.dumps(self.settings), **about()))
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, self.folder / CHECKPOINT)

    def backward(self, loss):
        """Add the gradient of a scalar to what has been gathered since the last update.

        raises  FloatingPointError for a loss that is not finite
        """
        if not loss.isfinite():
            raise FloatingPointError(f"{self.folder.name}: loss is {loss.item()}; nothing was updated; "
                                     "lower the learning rate")
        loss.backward()

    def update(self, loss, params, factor, clip=1.0):
        """Backward, average the gathered gradients over ranks, clip each parameter list by its own norm, step, clear.

        loss    scalar with gradient, or None when `backward` has gathered all there is
        params  list of parameter lists;  factor  share of the peak learning rates
        returns float: largest gradient norm before clipping
        raises  FloatingPointError naming what was not finite; nothing is updated then
        """
        if loss is not None:
            self.backward(loss)
        trained = [p for group in params for p in group if p.grad is not None]
        if world() > 1:
            flat = torch.cat([p.grad.flatten() for p in trained])
            dist.all_reduce(flat)
            for p, g in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
                p.grad = (g / world()).view_as(p)
        norms = [torch.nn.utils.clip_grad_norm_(group, clip) for group in params]
        if not all(n.isfinite() for n in norms):
            raise FloatingPointError(f"{self.folder.name}: gradient norm is {[n.item() for n in norms]}; "
                                     "nothing was updated")
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = factor * group["peak"]
            opt.step()
            opt.zero_grad(set_to_none=True)
        return max(n.item() for n in norms)

    def log(self, step, show=(), **values):
        """Append one JSON object to metrics.jsonl and show the values named in `show` beside the bar (rank 0)."""
        if rank() > 0:
            return
        row = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(strict(dict(step=step, seconds=round(time.time() - self.began, 2), **row)),
                               allow_nan=False) + "\n")
        self.bar.set_postfix_str("  ".join(f"{k} {row[k]:.3g}" for k in show if k in row), refresh=False)


def run_command(main, name):
    """Run a command line: user errors become one line on stderr and exit code 2, everything else stays a traceback."""
    try:
        main()
    except (UserError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError) as error:
        if os.environ.get("REASONX_TRACEBACK"):
            raise
        text = (str(error) if not isinstance(error, OSError) or error.filename is None
                else f"{error.filename}: {error.strerror}")
        text = " ".join(text.split())
        print(text if text.startswith(f"{name}: ") else f"{name}: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        shutdown()


def ema_update(average, model, decay):
    """Move the averaged weights toward the model's: average <- decay average + (1 - decay) model."""
    with torch.no_grad():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 1 - decay)
