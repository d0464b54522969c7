"""This process: its rank, device and precision; and the random numbers of a batch that all processes share.

Every rank draws the random numbers of the whole batch, in the same order, and keeps those of its own photos (`Draw`).
Losses and gradients are averaged over the ranks. So any number of processes takes the same steps.
The only file that touches torch.distributed.
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.config import UserError

STREAMS = dict(base=1, judge=2, grpo=3, photos=4, lora=5, oracle=6)    # of random numbers, one per purpose
PATIENCE = timedelta(minutes=10)  # for a collective of a step: on GPUs a process that has gone is missed only then
LONG = timedelta(hours=24)        # for a rank that is busy alone (bank, drawing, evaluation); on gloo, which misses
                                  # a process that has gone at once

BUCKET = 100e6                    # bytes of gradients that are sent together
patient = dict(group=None)        # the process group of such waits


def rank():
    """Number of this process, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes share the batch."""
    return int(os.environ.get("WORLD_SIZE", 1))


# device and precision -----------------------------------------------------------------------------------------------

def pick_device(name, command):
    """torch.device of a --device flag: auto, cpu or cuda; each process of torchrun has a GPU of its own.

    raises  UserError: cuda without a GPU, or with fewer than processes
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{command}: got --device cuda, but torch finds no GPU; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(f"{command}: process {local} of this machine has no GPU of its own (there are "
                        f"{torch.cuda.device_count()}); use --nproc_per_node={torch.cuda.device_count()}, or "
                        "--device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def setup(cfg):
    """Join the process group when started by torchrun, choose the device; returns the torch.device."""
    if cfg.fsdp and world() == 1:
        raise UserError("train.py: --fsdp with one process: it spreads the policy over those of torchrun "
                        "--nproc_per_node=N")
    device = pick_device(cfg.device, "train.py")
    if device.type == "cuda":
        use_tf32(cfg.precision != "fp32")
    if world() > 1 and not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                 # without it cuBLAS refuses to be exact
    torch.use_deterministic_algorithms(cfg.deterministic)
    return device


def use_tf32(on):
    """Whether products and convolutions of fp32 tensors, what lies outside autocast, may round to TF32 on a GPU."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def _join(backend):
    """Enter the process group, and one on the CPU for long waits (`barrier`, `combine_numbers`).

    torchrun keeps one store over its restarts on a node. A restarted process would find addresses of dead processes in
    it, so each attempt has its own part of the store. With several nodes each node counts its attempts by itself.
    """
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    patient["group"] = dist.new_group(backend="gloo", timeout=LONG)


def shutdown():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        patient["group"] = None


def is_lost_peer(error):
    """Whether an error only says that another process has gone."""
    return world() > 1 and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error))


def is_first_to_fail():
    """Whether this process is the one to print an error: the first that fails, or rank 0 of a node before all met."""
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:                                                        # the process that kept count has gone
        return True


def is_joined():
    """Whether this process belongs to a process group, whose other members may wait for it."""
    return dist.is_initialized()


def in_bf16(precision, device):
    """Whether the networks multiply in bf16: precision "bf16", or "auto" where the hardware has it."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return precision == "bf16" or (precision == "auto" and native)


def autocast(precision, device, cache=True):
    """Context for the networks' forward passes: bf16 products where the hardware has them ("auto"), "bf16" or "fp32".

    cache  keep the 16-bit copies of the weights until the context ends: faster, but half the weights more in memory
    Likelihoods, losses and weights stay fp32. A CPU without bf16 instructions runs fp32, about half as fast.
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache, enabled=in_bf16(precision, device))


# random numbers -----------------------------------------------------------------------------------------------------

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


class Draw:
    """Random numbers of one step, drawn for the whole batch by every rank; each rank keeps those of its own photos.

    rng    CPU generator of the step, the same on every rank;  batch  B', photos of the step over all ranks
    A shape names the whole batch, so it holds B'; `axis` says where. What has no such axis is the same on every rank.
    """

    def __init__(self, rng, batch):
        self.rng, self.batch = rng, batch

    def integer(self, n):
        """One number in 0 .. n - 1, the same on every rank."""
        return int(torch.randint(n, (1,), generator=self.rng))

    def integers(self, n, shape, axis=0):
        """Numbers in 0 .. n - 1: int64 on the CPU, cut to this rank's photos along `axis`."""
        return own_part(torch.randint(n, shape, generator=self.rng), axis)

    def choices(self, n, k):
        """k different numbers of 0 .. n - 1 for each photo: (B, k) int64 on the CPU."""
        return own_part(torch.stack([torch.randperm(n, generator=self.rng)[:k] for _ in range(self.batch)]))

    def normal(self, shape, device, axis=0):
        """Standard normal numbers on a device, cut to this rank's photos. They are drawn there: a CPU is slow."""
        rng = on_device(self.rng, device)
        return own_part(torch.randn(shape, generator=rng, device=rng.device), axis)


def own_part(x, axis=0):
    """This rank's part of a tensor that every rank has drawn for the whole batch along `axis`."""
    return x.chunk(world(), axis)[rank()]


def divide_batch(total, name):
    """This rank's number of the `total` items of a step. raises UserError when they do not divide."""
    if total % world():
        raise UserError(f"train.py: --{name} {total} is not divisible by {world()} processes; "
                        f"use a multiple of {world()}")
    return total // world()


# what ranks tell each other -----------------------------------------------------------------------------------------

def say(text):
    """Print a line once: on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def barrier():
    """Wait for all ranks, for hours if need be (nothing to do for one process)."""
    if world() > 1:
        dist.barrier(**patient)


def mean_over_ranks(x):
    """Mean over ranks of a tensor without gradient: a statistic of one rank's rows becomes that of the batch."""
    if world() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= world()
    return x


def add_over_ranks(x):
    """Sum over ranks of a tensor, in place (nothing to do for one process)."""
    if world() > 1:
        dist.all_reduce(x)


def average_over_ranks(tensors):
    """Mean over ranks of tensors, in place: in buckets, of which one is on its way while the next is put together."""
    if world() == 1:
        return
    buckets = [[]]
    for x in tensors:
        if sum(y.nbytes for y in buckets[-1]) > BUCKET:
            buckets.append([])
        buckets[-1].append(x)
    sent = []
    for bucket in (*filter(None, buckets), None):
        if bucket:
            flat = torch.cat([x.flatten() for x in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if sent and (bucket is None or len(sent) > 1):
            own, flat, work = sent.pop(0)
            work.wait()
            flat /= world()
            for x, mean in zip(own, flat.split([x.numel() for x in own]), strict=True):
                x.copy_(mean.view_as(x))


def share_rows(n):
    """Numbers of those of n rows that this rank computes: as many on each, some twice where n does not divide."""
    each = -(-n // world())
    return [(rank() * each + i) % n for i in range(each)]


def gather_rows(x, n):
    """All n rows, on the CPU, of which each rank has computed those of `share_rows`, x (n / world, ...)."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous(), **patient)
    return torch.cat(parts)[:n]


def read_numbers(values):
    """A dict of numbers and 0-dim tensors as floats; a GPU is waited for once, not once a value."""
    tensors = {k: v.detach() for k, v in values.items() if isinstance(v, torch.Tensor)}
    read = torch.stack(list(tensors.values())).tolist() if tensors else ()
    return {**values, **dict(zip(tensors, read, strict=True))}


def combine_numbers(values):
    """Numbers to log, of all ranks: their mean; the least of a name that ends in _min, the greatest for _max.

    It waits for hours, if need be, for a rank that is busy alone.
    values  dict name -> number or 0-dim tensor, the same names on each rank
    """
    if world() == 1:
        return values
    own = torch.tensor([*read_numbers(values).values()], dtype=torch.float64)
    each = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(each, own, **patient)
    each = torch.stack(each)                                                    # (ranks, values)
    ends = dict(_min=each.amin(0), _max=each.amax(0))
    return {k: ends.get(k[-4:], each.mean(0))[i].item() for i, k in enumerate(values)}


# weights that are spread over ranks ---------------------------------------------------------------------------------

def spread_weights(module, device, methods=()):
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


def is_spread(x):
    """Whether a tensor is spread over ranks."""
    return isinstance(x, DTensor)


def gather_tensor(x):
    """A tensor as it is, or gathered from all ranks when it is spread (then all ranks call)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x):
    """The part of a tensor that this rank holds: the tensor itself, unless it is spread."""
    return x.to_local() if isinstance(x, DTensor) else x


def give_form(value, like):
    """A whole tensor in the form of `like`: spread over ranks, or with its strides, as fused AdamW wants them."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
