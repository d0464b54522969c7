"""Low-rank adapters: W x + (alpha / r) B A dropout(x) on chosen linear layers, in PEFT's files (Hu et al. 2022).

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r)
    adapter_config.json         r, lora_alpha, lora_dropout, target_modules, ...
B starts at zero, so a new adapter does not change any bit of the output. Paths are relative to the network that was
given to `inject`.
"""
import difflib
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime.files import read_json, read_tensors, refuse, write_json, write_weights
from runtime.weights import bounded_integer, plain_name

PREFIX = "base_model.model."
KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight")
# options that change what the network computes, beside every use_...
REFUSED = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication", "lora_bias",
           "alora_invocation_tokens", "arrow_config", "target_parameters", "trainable_token_indices")
FILES = ("adapter_config.json", "adapter_model.safetensors")
INITS = (None, True, False, "gaussian", "eva", "orthogonal")    # that leave the base as it is; pissa, olora, ... do not


def merge_low_rank(weight, A, B, scale):
    """Weight of the one linear layer that equals a layer plus its adapter: W + scale B A, computed in float32.

    weight   (out, in)  of the layer alone, any float dtype;  A (r, in), B (out, r)
    scale    alpha / r
    returns  (out, in) in the dtype of `weight`
    """
    return (weight.float() + scale * B.float() @ A.float()).to(weight.dtype)


class LoRALinear(nn.Module):
    """A frozen nn.Linear `base` plus a trainable adapter; with `active` False it is `base` alone."""

    def __init__(self, base, r, alpha, dropout=0.0, rng=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.active = True
        self.train(base.training)
        like = dict(dtype=torch.float32, device=base.weight.device)
        bound = 1 / math.sqrt(base.in_features)                                 # kaiming_uniform(a = sqrt 5)
        start = torch.rand(r, base.in_features, generator=rng) * 2 * bound - bound
        self.lora_A = nn.Parameter(start.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))

    def forward(self, x):
        y = self.base(x)
        if not self.active:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return y + (self.alpha / self.r * F.linear(low, self.lora_B)).to(y.dtype)

    def merged_weight(self):
        """Weight (out, in) of the equivalent nn.Linear, in the dtype of the base."""
        return merge_low_rank(self.base.weight, self.lora_A, self.lora_B, self.alpha / self.r)


def adapters(network):
    """The layers of a network that have an adapter: dict path -> LoRALinear."""
    return {path: m for path, m in network.named_modules() if isinstance(m, LoRALinear)}


def _path_ends_in(path, target):
    return path == target or path.endswith(f".{target}")


def inject(network, targets, r, alpha, dropout=0.0, rng=None):
    """Freeze a network and add an adapter to every nn.Linear whose path ends in one of `targets`; returns their paths.

    raises  ValueError when a target matches no linear layer
    """
    found = [path for path, m in network.named_modules()
             if isinstance(m, nn.Linear) and any(_path_ends_in(path, t) for t in targets)]
    for t in targets:
        if not any(_path_ends_in(path, t) for path in found):
            raise ValueError(f"lora.inject: got target {t!r}, which names no linear layer of "
                             f"{type(network).__name__}; want the end of a module path")
    network.requires_grad_(False)
    for path in found:
        _replace(network, path, LoRALinear(network.get_submodule(path), r, alpha, dropout, rng))
    return found


def _replace(network, path, module):
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def disable(network):
    """Switch all adapters off: the network computes what its base does. A network without adapters is unchanged."""
    for layer in adapters(network).values():
        layer.active = False


def merge(network):
    """Fold all adapters into their linear layers, in place."""
    for path, layer in adapters(network).items():
        with torch.no_grad():
            layer.base.weight.copy_(layer.merged_weight())
        _replace(network, path, layer.base)


def merged_state(network):
    """state_dict of the network with merged adapters, under the names from before `inject`; nothing is changed."""
    found = adapters(network)
    state = {}
    for key, value in network.state_dict().items():
        path, _, name = key.rpartition(".")
        parent, _, last = path.rpartition(".")
        if path in found:                                                       # lora_A, lora_B
            continue
        if last == "base" and parent in found:
            state[f"{parent}.{name}"] = found[parent].merged_weight() if name == "weight" else value
        else:
            state[key] = value
    return state


def write_adapters(network, folder, base=""):
    """Write the adapters of a network by save_adapter; where it has none, remove those that a save before left."""
    if adapters(network):
        save_adapter(network, folder, base)
    else:
        for name in FILES:
            (Path(folder) / name).unlink(missing_ok=True)


def save_adapter(network, folder, base="", task=None):
    """Write the adapters in PEFT layout; `base` names the base model, `task` is PEFT's task_type. raises OSError."""
    folder = Path(folder)
    found = adapters(network)
    one = next(iter(found.values()))
    write_weights(folder / "adapter_model.safetensors", {
        f"{PREFIX}{path}.{k}.weight": getattr(m, k) for path, m in found.items() for k in ("lora_A", "lora_B")})
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type=task, base_model_name_or_path=base, r=one.r, lora_alpha=one.alpha,
        lora_dropout=one.dropout, target_modules=sorted(found), bias="none", inference_mode=True, fan_in_fan_out=False,
        init_lora_weights=True))


def load_adapter(network, folder, older=str):
    """Inject the adapters of a PEFT folder into a network that has none.

    older   function of a layer's path as older code named it -> its path in the network
    raises  FileNotFoundError: no adapter there; ValueError: another kind of adapter, keys that fit no linear layer
    """
    folder = Path(folder)
    where = f"lora.load_adapter: {folder}"
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"lora.load_adapter: got no {name} in {folder}; want a PEFT adapter folder")
    cfg = read_json(folder / "adapter_config.json")
    state = read_tensors(folder / "adapter_model.safetensors")
    r, alpha, dropout = _read_options(cfg, where)
    low = _match_layers(network, state, older, where)
    for path, pair in low.items():                                              # before `inject` allocates memory
        base = network.get_submodule(path)
        for k, want in (("A", (r, base.in_features)), ("B", (base.out_features, r))):
            got = tuple(pair[k].shape)
            if got != want:
                raise ValueError(f"{where}: {path}.lora_{k}: got {got}, want {want}; was it trained from another base?")
    inject(network, list(low), r, alpha, dropout)
    for path, layer in adapters(network).items():
        layer.lora_A.data.copy_(low[path]["A"])
        layer.lora_B.data.copy_(low[path]["B"])


def _read_options(cfg, where):
    """r, alpha and dropout of an adapter_config.json (a dict). raises ValueError: it is more than plain LoRA."""
    odd = [k for k, v in cfg.items() if v and (k in REFUSED or k.startswith("use_"))]
    if cfg.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{where}: got {cfg.get('peft_type')!r} with {odd or 'no further options'}; "
                         "want plain LoRA; merge it with peft first")
    init = cfg.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        raise ValueError(f"{where}: got init_lora_weights = {init!r}, which may change the base, want one of "
                         f"{', '.join(map(str, INITS[1:]))}; convert it with peft's "
                         "save_pretrained(path_initial_model_for_weight_conversion=...)")
    r = bounded_integer(cfg.get("r"), 1, 1 << 14, "r", where)
    alpha = cfg.get("lora_alpha")
    dropout = cfg.get("lora_dropout", 0.0)
    for name, value, most in (("lora_alpha", alpha, 1e6), ("lora_dropout", dropout, 1)):
        if not isinstance(value, (int, float)) or not 0 <= value <= most:
            refuse(where, f"{name} = {value!r}", f"a number in 0..{most:g}", "copy it again")
    return r, alpha, dropout


def _match_layers(network, state, older, where):
    """Tensors of an adapter by the path of their linear layer: dict path -> dict A, B. raises ValueError: they do not.

    A key may name its layer as older code did (see load_adapter), if no two keys name the same.
    """
    linear = [path for path, m in network.named_modules() if isinstance(m, nn.Linear)]
    low = {}
    wrong = []
    for key, value in state.items():
        found = KEY.fullmatch(plain_name(key))
        path = found[1] if found else ""
        path = path if path in linear else older(path)
        if path not in linear or found[2] in low.setdefault(path, {}):
            wrong.append(key)
        else:
            low[path][found[2]] = value
    wrong += [f"{PREFIX}{path}.lora_{k}.weight" for path, pair in low.items() for k in "AB" if k not in pair]
    if wrong:
        near = (difflib.get_close_matches(wrong[0], linear, 1, 0) or ["none"])[0]
        raise ValueError(f"{where}: {len(wrong)} of {len(state)} keys match no linear layer (first: {wrong[0]}; the "
                         f"nearest of the network: {near}); was it trained from another base?")
    return low
