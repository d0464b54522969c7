"""The copies of a predictor in a GRPO run: the policy, its frozen reference, the actor that samples, the average.

How they are stored is decided here: 16-bit weights, adapters (LoRA), weights spread over processes (FSDP2),
torch.compile, exponential averages.
"""
import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models import lora
from runtime.ranks import STREAMS, gather_tensor, generator, in_bf16, local_part, rank, spread_weights

CALLS = ("encode", "velocity", "predict")        # methods of a network that use its weights, beside forward
COMPILED_VARIANTS = 64            # most compiled versions of one function in a process (networks, sizes)


class Networks:
    """The copies of a policy that a GRPO run uses.

    policy     trains; with cfg.lora only its adapters do
    reference  the frozen start; in bf16, without lora and fsdp, it stores in 16 bits what autocast would cast; so do,
               with lora on a GPU, all copies, which share their frozen weights
    average    exponential moving average of the policy: it is evaluated and saved
    actor      samples the groups: the policy itself, or with cfg.compile a compiled copy of it, kept like the reference

    open_policy  function of no arguments: opens the predictor that training starts from, on the CPU
    cfg          lora, checkpointing, compile, fsdp, precision, ema, seed of runtime.config.Config
    """

    def __init__(self, open_policy, cfg, device):
        self.cfg = cfg
        self._open_policy = open_policy
        self.policy = prepare_policy(open_policy().to("cpu" if cfg.fsdp else device), cfg)
        self.reference = frozen_copy(self.policy)
        self.average = frozen_copy(self.policy)
        lora.disable(self.reference)
        self._actor = frozen_copy(self.policy) if cfg.compile else self.policy
        if not cfg.lora and not cfg.fsdp and in_bf16(cfg.precision, device):
            for net in {self.reference, self._actor} - {self.policy}:
                keep_in_bf16(net.network)
        self._is_rounded = bool(cfg.lora and not cfg.fsdp and device.type == "cuda" and in_bf16(cfg.precision, device))
        if self._is_rounded:
            keep_in_bf16(self.policy.network)
        for net in (self.policy, self.reference, self._actor) if cfg.compile else ():
            compile_velocity(net)
        for net in (self.policy, self.reference, self.average) if cfg.fsdp else ():
            spread_weights(net.network, device, [f for f in CALLS if hasattr(net.network, f)])
            net.to(device)
        # a checkpoint holds the parameters that train, no others
        self.modules = dict(policy=trained_part(self.policy), average=trained_part(self.average, like=self.policy))
        self._acting = list(trained_part(self._actor, like=self.policy).parameters())

    @property
    def params(self):
        """The parameters that train."""
        return list(self.modules["policy"].parameters())

    @property
    def actor(self):
        """The network that samples, with the policy's present weights."""
        if self._actor is not self.policy:
            copy_parameters(self._acting, self.params)
        return self._actor

    def follow(self, step):
        """Move the average toward the policy after `step`."""
        update_average(self.modules["average"], self.modules["policy"], average_decay(self.cfg.ema, step))

    @property
    def takes_part(self):
        """Whether this rank evaluates and writes the average: rank 0, or all when weights are spread over them."""
        return rank() == 0 or self.cfg.fsdp

    def save_average(self, folder, **about):
        """Write the averaged policy, on rank 0; every rank that takes part must call this. raises OSError."""
        state = {}
        if self.cfg.fsdp:
            state = {k: gather_tensor(v) for k, v in self.average.network.state_dict().items()}
        if rank() > 0:
            return
        average = self.average
        if self.cfg.fsdp or self._is_rounded:
            average = prepare_policy(self._open_policy(), self.cfg)
        if self.cfg.fsdp:
            average.network.load_state_dict(state)
        elif self._is_rounded:                                                  # adapters of the weights as published
            copy_parameters(trained_part(average).parameters(), self.modules["average"].parameters())
        average.save(folder, **about)


def prepare_policy(policy, cfg):
    """A predictor with new adapters (cfg.lora) that recomputes activations (cfg.checkpointing)."""
    if cfg.lora:
        rng = generator(cfg.seed, STREAMS["lora"])
        lora.inject(policy.network, policy.lora_targets, cfg.lora, cfg.lora, rng=rng)
    if hasattr(policy, "begin_training"):
        policy.begin_training()
    policy.checkpointing(cfg.checkpointing)
    return policy


def trained_part(module, like=None):
    """The parameters of a module that train (in `like`, if given), as a module that shares them, for checkpoints."""
    names = [name for name, p in (like or module).named_parameters() if p.requires_grad]
    own = dict(module.named_parameters())
    return torch.nn.ParameterDict({name.replace(".", "|"): own[name] for name in names})


def frozen_copy(module):
    """A frozen deep copy; parameters that are frozen already are shared, not copied."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen).requires_grad_(False)


def multiplying_layers(network):
    """The layers of a network whose weights autocast casts."""
    return [m for m in network.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]


def keep_in_bf16(network):
    """Cast, in place, the weights that autocast would cast to bf16 at every call: the same bits, half the memory."""
    for m in multiplying_layers(network):
        m.to(torch.bfloat16)


def use_half(policy, device):
    """Let a predictor compute in 16 bits, in place: fp16 on a GPU, bf16 on a CPU.

    A family with a pipeline of its own keeps its weights so. Any other is under autocast, since it may make tables in
    fp32 at each call
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    if hasattr(policy, "photo_maps"):
        policy.to(dtype)
        return
    for name in ("encode", "velocity", "decode"):
        setattr(policy, name, torch.autocast(device.type, dtype)(getattr(policy, name)))


def compile_velocity(policy):
    """torch.compile a predictor's velocity, in place; on a GPU convolution weights are stored channels last."""
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    if next(policy.network.parameters()).is_cuda:
        policy.network.to(memory_format=torch.channels_last)
    policy.velocity = torch.compile(policy.velocity, dynamic=False)


def copy_parameters(copies, params):
    """Copy parameters into those of another network, rounded to their dtype."""
    with torch.no_grad():
        for c, p in zip(copies, params, strict=True):
            c.copy_(p)


def average_decay(most, step):
    """Decay of the average after `step`: it rises to `most` over the first steps."""
    return min(most, (step + 1) / (step + 10))


def update_average(average, model, decay):
    """Move the averaged weights toward the model's: average <- decay average + (1 - decay) model."""
    pairs = [(local_part(a), local_part(p)) for a, p in zip(average.parameters(), model.parameters(), strict=True)]
    get_ema_multi_avg_fn(decay)(*zip(*pairs, strict=True), None)                # all tensors in a few GPU launches
