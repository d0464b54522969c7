"""A stand-in for a GPU: ordinary tensors that say they are on `cuda`, for tests on a machine without one.

Under StandIn every call of torch is watched: what is asked for on "cuda" is computed here and marked, what is made of
marked tensors is marked, and a call that mixes marked and other tensors raises as a GPU's would. Values are real, so
whole training runs work. What makes the host wait for a GPU is counted in `waits`: reads of its values, calls whose
result's size it decides, and copies to it from memory that is not pinned. With `bf16` the autocast of a GPU is that of
a CPU, with the norms and exponentials in fp32 as there, and `Operators` counts what is launched and cast.
"""
import collections

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CUDA = torch.device("cuda", 0)
AUTOCAST = torch.autocast
WAITS = {"item", "tolist", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "unique", "equal",
         "masked_select", "allclose", "bincount", "__contains__"}
MAKES = {"tensor", "as_tensor", "new_tensor", "scalar_tensor", "asarray"}       # of numbers that the host has
FP32 = {"softmax", "log_softmax", "cross_entropy", "binary_cross_entropy_with_logits",
        "exp", "log", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "__rtruediv__", "norm", "sum", "cumsum",
        "prod", "softplus"}                                                     # of a GPU's autocast
ACROSS = {"to", "cpu", "cuda", "copy_", "__set__", "_has_compatible_shallow_copy_type"}         # may see two devices
STRICT = {"cat", "stack", "matmul", "__matmul__", "gather", "index_copy"}       # not even a 0-dim tensor from elsewhere


class Generator(torch.Generator):
    """A generator that says it is on the stand-in."""

    device = CUDA


def marked(x):
    """Whether a tensor is on the stand-in."""
    return getattr(x, "_on_standin", False)


def _is_cuda(x):
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))


class Operators(TorchDispatchMode):
    """Counts what a GPU would launch for the marked calls of a StandIn, backward passes included.

    launches  operators that are no views: a lower bound, since some launch several kernels;  casts  those that change
    the dtype of a whole tensor
    """

    def __init__(self, standin):
        super().__init__()
        self.standin = standin
        self.launches = 0
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.standin.inside or any(r.alias_info is not None and not r.alias_info.is_write
                                          for r in func._schema.returns):
            return out
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.empty.memory_format):
            return out
        self.launches += 1
        self.casts += func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype
        return out


class StandIn(TorchFunctionMode):
    """See the module docstring; `waits` counts the calls that a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.copies = 0                                                         # to the GPU
        self.inside = False                                                     # a call on marked tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if func == torch.Tensor.device.__get__:
            return CUDA if marked(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return marked(args[0])
        if name == "_parse_to" or func is torch.device:                         # these make nothing
            return func(*args, **kwargs)
        given = args[:1] if name == "__deepcopy__" else (args, kwargs)          # not what was copied before
        tensors = [x for x in tree_flatten(given)[0] if isinstance(x, torch.Tensor)]
        here = any(map(marked, tensors))
        if name in ("numpy", "__array__") and here:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned._pinned = True
            return pinned
        self._check(name, tensors, args, kwargs)
        want = self._wanted(name, args, kwargs)
        self._count(name, args, kwargs, tensors, here, want)
        args = tuple(torch.device("cpu") if _is_cuda(x) else x for x in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        place = here if want is None else want
        outer, self.inside = self.inside, here or bool(place)
        if name in FP32 and here and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in args)
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = outer
        if name == "__set__" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args[0]._on_standin = marked(args[1])
        elif isinstance(out, torch.Tensor):
            out = self._mark(out, place, tensors)
        elif isinstance(out, (tuple, list, dict)):
            for x in tree_flatten(out)[0]:
                if isinstance(x, torch.Tensor):
                    self._mark(x, place, tensors)
        return out

    def _count(self, name, args, kwargs, tensors, here, want):
        """Count what a call makes the host wait for, and copies to the GPU."""
        if here and (name in WAITS or name == "to" and want is False or name == "where" and len(args) == 1):
            self.waits[name] += 1
        if name in ("__getitem__", "__setitem__") and marked(args[0]):
            chosen = [x for x in tree_flatten(args[1])[0] if isinstance(x, torch.Tensor)]
            away = [x for x in chosen if x.ndim and not marked(x)]              # is sent there
            self.waits["index"] += bool(away)
            self.copies += len(away)
            if name == "__getitem__" or isinstance(args[2], torch.Tensor) and args[2].ndim:
                self.waits["mask"] += any(x.dtype == torch.bool for x in chosen)
        if name in ("repeat_interleave", "split") and any(isinstance(x, torch.Tensor) and marked(x) for x in args[1:2]):
            self.waits[name] += 1
        made = name in MAKES and want and not here
        if made or name == "to" and want and tensors and not here:
            self.copies += 1
            pinned = not made and getattr(args[0], "_pinned", False) and kwargs.get("non_blocking")
            self.waits["to the GPU"] += not pinned
        if name == "copy_" and marked(args[0]) != marked(args[1]):
            self.copies += marked(args[0])
            self.waits["copy_"] += 1

    @staticmethod
    def _mark(x, place, given):
        if any(x is g for g in given) and marked(x) != place:                   # `to` gave back what it got
            x = x.clone()
        x._on_standin = place
        return x

    @staticmethod
    def _wanted(name, args, kwargs):
        """True: on the stand-in, False: on the CPU, None: where its arguments are."""
        if name in ("cpu", "cuda"):
            return name == "cuda"
        for x in (kwargs.get("device"), *(args[1:] if name == "to" else args)):
            if isinstance(x, torch.device) or name == "to" and isinstance(x, str):
                return _is_cuda(x)
        if isinstance(kwargs.get("device"), str):
            return _is_cuda(kwargs["device"])
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            return marked(args[1])
        return None

    def _check(self, name, tensors, args, kwargs):
        rng = kwargs.get("generator")
        if rng is not None:
            at = self._wanted(name, args, kwargs)
            if isinstance(rng, Generator) != (any(map(marked, tensors)) if at is None else at):
                raise RuntimeError(f"{name}: a generator of another device than the tensor")
        if name in ACROSS or not any(map(marked, tensors)):
            return
        if name == "__getitem__" and marked(args[0]):                           # a CPU index is sent there
            return
        if name == "__setitem__" and marked(args[0]) and not any(
                isinstance(x, torch.Tensor) for x in tree_flatten(args[1])[0]):
            return
        other = [x for x in tensors if not marked(x) and (x.ndim or name in STRICT)]
        if other:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu "
                               f"{[tuple(x.shape) for x in other]}")


def install(monkeypatch, bf16=False):
    """Make torch and the project believe in the stand-in; returns the device. Use inside `with StandIn()`."""
    from models import mini_judge
    from runtime import ranks
    make = torch.Tensor._make_subclass

    def on_device(rng, device):
        if torch.device(device).type == "cpu":
            return rng
        there = Generator()
        there.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
        return there

    def made(cls, data, requires_grad=False, **kwargs):
        out = make(cls, data, requires_grad, **kwargs)
        out._on_standin = marked(data)
        return out

    monkeypatch.setattr(torch.Tensor, "_make_subclass", staticmethod(made))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    monkeypatch.setattr(ranks, "on_device", on_device)
    monkeypatch.setattr(mini_judge, "on_device", on_device)
    group = clip_grad._group_tensors_by_device_and_dtype                        # C++: it sees the device beneath
    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", lambda lists: {
        (CUDA if marked(lists[0][0]) else device, dtype): found for (device, dtype), found in group(lists).items()})
    if bf16:
        for name in ("layer_norm", "group_norm"):                               # also when a layer is computed again
            norm = getattr(F, name)
            monkeypatch.setattr(F, name, lambda x, *args, norm=norm, **kwargs: norm(
                x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs))
        monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: AUTOCAST("cpu", *args, **kwargs))
    return CUDA
