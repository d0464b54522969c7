"""A stand-in for a GPU: ordinary tensors that say they are on `cuda`, for tests on a machine without one.

Under StandIn every call of torch is watched: what is asked for on "cuda" is computed here and marked, what is made of
marked tensors is marked, and a call that mixes marked and other tensors raises as a GPU's would. Values are real, so
whole training runs work. What makes the host wait for a GPU is counted in `waits`.
"""
import collections

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CUDA = torch.device("cuda", 0)
WAITS = {"item", "tolist", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "unique"}
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


class StandIn(TorchFunctionMode):
    """See the module docstring; `waits` counts the calls that a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

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
        self._check(name, tensors, args, kwargs)
        want = self._wanted(name, args, kwargs)
        if here and (name in WAITS or name == "to" and want is False):
            self.waits[name] += 1
        if name == "to" and want and tensors and not here and not kwargs.get("non_blocking"):
            self.waits["to the GPU"] += 1
        args = tuple(torch.device("cpu") if _is_cuda(x) else x for x in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        place = here if want is None else want
        if name == "__set__" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args[0]._on_standin = marked(args[1])
        elif isinstance(out, torch.Tensor):
            out = self._mark(out, place, tensors)
        elif isinstance(out, (tuple, list, dict)):
            for x in tree_flatten(out)[0]:
                if isinstance(x, torch.Tensor):
                    self._mark(x, place, tensors)
        return out

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
            self.waits["index"] += any(not marked(x) for x in tensors)
            return
        if name == "__setitem__" and marked(args[0]) and not any(
                isinstance(x, torch.Tensor) for x in tree_flatten(args[1])[0]):
            return
        other = [x for x in tensors if not marked(x) and (x.ndim or name in STRICT)]
        if other:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu "
                               f"{[tuple(x.shape) for x in other]}")


def install(monkeypatch):
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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    monkeypatch.setattr(ranks, "on_device", on_device)
    monkeypatch.setattr(mini_judge, "on_device", on_device)
    return CUDA
