"""The policy's figures: a GRPO step at the sizes of the published Marigold, beside the same loop with diffusers.

Rows: one forward pass of the U-Net in several ways, a rollout with its update, and the whole step.
"""
import functools
import math
import time
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.arithmetic import SD2
from bench.measure import GPU, Row, count_tflop, new_tensors
from bench.peer import Peer, diffusers
from data.bank import Judgements
from grpo import advantage, draw_batch, policy_gradient, sample_groups, score
from models.copies import Networks
from models.marigold import Marigold
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from runtime import ranks
from runtime.flags import parse
from runtime.optimizers import optimizers


def build_policy(sizes, device):
    """A random Marigold of the public sizes: lighting, three targets."""
    with torch.device(device):
        unet = UNet(sizes.sd2["unet"])
        vae = VAE(sizes.sd2["vae"])
        text = torch.randn(1, 2, sizes.sd2["unet"]["cross_attention_dim"])
    return Marigold(unet, vae, Schedule(sizes.sd2["scheduler"]), text, sizes.sd2["index"]).eval()


class Step:
    """One photo's GRPO step as train.train_grpo takes it: the paper's settings, random photo and answers.

    It stands in for a runtime.run.Run: `backward` gathers the gradient, what `bound` notes is read with its norm.
    """

    def __init__(self, bench, px, *flags):
        sizes = bench.sizes
        device = bench.device
        self.cfg = parse([
            "--preset", "paper", "--stage", "grpo", "--policy", "P", "--judge", "J", "--images", "I", "--batch", "1",
            "--size", str(px), "--group", str(sizes.group), "--sample-steps", str(sizes.steps), "--pairs",
            str(sizes.pairs), "--bank-pairs", str(sizes.pairs), "--exploration", "ddim",
            *(["--precision", "fp32"] if bench.dry else []), *flags])[1]
        self.device = device
        self.noted = []
        self.nets = Networks(lambda: build_policy(sizes, device), self.cfg, device)
        self.opts = optimizers([self.nets.policy], self.cfg.lr, 0, weight_decay=0.0, betas=(0.9, 0.95))
        self.judged = Judgements(torch.randint(256, (1, 3, px, px), dtype=torch.uint8),
                                 torch.randint(px, (1, sizes.pairs, 2, 2)), torch.rand(1, sizes.pairs, 4), ["photo"])

    def explore(self, prob=None):
        """Batch, transitions and advantage of a rollout; prob (1, P, 4): answers, instead of the random ones."""
        judged = self.judged if prob is None else replace(self.judged, prob=prob)
        draw = ranks.Draw(torch.Generator().manual_seed(0), 1)
        batch = draw_batch(judged, self.nets.policy.modalities, self.cfg, draw, self.device)
        maps, transitions = sample_groups(self.nets.actor, batch)
        scored = {m: score(maps, batch, m) for m in maps}
        for x in (*maps.values(), *(one.reward for one in scored.values())):
            self.bound(~x.flatten(1).isfinite().all(1), 0, "")
        return batch, transitions, advantage(scored, batch, transitions)

    def bound(self, values, most, text):
        """As Run.bound; numbers of random weights may be any."""
        self.noted.append(values.detach().flatten())

    def backward(self, share):
        """As Run.backward."""
        self.bound(share, 0, "")
        share.backward()

    def gradient(self, prob=None):
        """Rollout and update: the gradient of one step."""
        self.noted.clear()
        for p in self.nets.params:
            p.grad = None
        policy_gradient(self.nets, *self.explore(prob), self)

    def update(self, prob=None):
        """The whole step: the gradient, its norm clipped, AdamW, the average, the acting copy."""
        self.gradient(prob)
        norm = torch.nn.utils.clip_grad_norm_(self.nets.params, 1.0)
        torch.cat([norm.flatten(), *self.noted]).tolist()                       # as Run.update waits
        for opt in self.opts:
            opt.step()
        self.nets.follow(1000)


def peer_call(step, bench):
    """The call of the loop with diffusers, on the draws of one of our rollouts.

    raises  ValueError  on a CPU, when its gradient differs from ours
    """
    peer = Peer(step.nets.policy, step.nets.reference, bench.sizes.sd2, step.cfg, step.judged.rgb)
    batch, transitions, credit = step.explore()
    first = transitions[0]
    start = (first.x / math.hypot(1 - first.t, first.t)).expand(step.cfg.group, -1, -1, -1)
    noise = [((one.x_next - one.mean[:, None]) / one.std).flatten(0, 1) for one in transitions]
    call = functools.partial(peer.gradient, start, noise, credit.flatten())
    if bench.dry:
        call()
        policy_gradient(step.nets, batch, transitions, credit, step, update=1)
        theirs = dict(peer.unet.named_parameters())
        for name, p in step.nets.policy.unet.named_parameters():
            gap = (p.grad - theirs[name].grad).abs().max()
            size = theirs[name].grad.abs().max()
            if not gap <= 1e-3 * size + 1e-7:
                raise ValueError(f"bench.system: gradient of {name}: ours and the loop with diffusers differ by "
                                 f"{gap:.2e} of {size:.2e}")
    return call


@functools.cache
def policy_tflop(px):
    """Operations at full size, in TFLOP: (one forward pass of a state, rollout and update of a photo)."""
    with torch.device("meta"):
        unet = UNet(SD2["unet"])
        x = torch.empty(1, 16, px // 8, px // 8)
        text = torch.empty(1, 2, 1024)
    with torch.enable_grad():
        both = count_tflop(lambda: unet(x, 0, text).sum().backward())
    with torch.no_grad():
        once = count_tflop(lambda: unet(x, 0, text))
        with FakeTensorMode():
            vae = VAE(SD2["vae"])
            encoding = count_tflop(lambda: vae.encode(torch.empty(1, 3, px, px)))
            decoding = count_tflop(lambda: vae.decode(torch.empty(1, 4, px // 8, px // 8)))
    G = GPU.group
    states = 1 + G * (GPU.steps - 2)                                            # trained; a group shares the first one
    return once, 3 * encoding + G * decoding + once * (states + G) + (once + both) * states


def forward_ways(bench, unet, x, t, text):
    """Ways to run the U-Net: dict name -> () -> call. The last two turn its weights to channels last."""
    def eager():
        return lambda: unet(x, t, text)

    def graph():
        unet(x, t, text)                                                        # libraries choose before the recording
        if bench.dry:
            return eager()
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            unet(x, t, text)
        return recorded.replay

    def channels_last():
        unet.to(memory_format=torch.channels_last)
        return eager()

    def compiled():
        fast = torch.compile(unet.to(memory_format=torch.channels_last), dynamic=False)
        return lambda: fast(x, t, text)

    return {"eager": eager, "CUDA graph": graph, "channels last": channels_last,
            "torch.compile, channels last": compiled}


def forward_rows(bench, full, px):
    """Rows of one forward pass of a group through the network that acts; `px` are run, `full` px is the row's name."""
    sizes = bench.sizes
    side = px // 8
    dtype = torch.float32 if bench.dry else torch.bfloat16
    with new_tensors(bench.device, dtype):
        unet = UNet(sizes.sd2["unet"]).requires_grad_(False)
        text = torch.randn(1, 2, sizes.sd2["unet"]["cross_attention_dim"])
        x = torch.randn(sizes.group, 16, side, side)
        t = torch.zeros(())                                                     # on the device: a graph copies nothing

    def peer():
        with new_tensors(bench.device, dtype):
            net = diffusers.UNet2DConditionModel(**sizes.sd2["unet"])
        many = text.expand(len(x), -1, -1)
        return lambda: net(x, t, many).sample

    ways = forward_ways(bench, unet, x, t, text)
    if px != sizes.sides[0]:
        ways = {"eager": ways["eager"]}
    with torch.no_grad():
        peer_ms = None
        if diffusers:
            peer_ms = bench.attempt(f"policy: U-Net forward, {full} px: diffusers", make=peer)[0][0]
        for way, make in ways.items():
            bench.add(Row("policy", f"U-Net forward, {full} px: {way}", f"{GPU.group} states",
                          tflop=policy_tflop(full)[0] * GPU.group, instead="diffusers, eager", instead_ms=peer_ms),
                      make=make)


def cpu_row(bench):
    """Row of one forward pass of the full-size U-Net on the CPU, in bf16, beside the CPU's rate of a matrix product."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    tflops = 2 * 2048**3 / min(seconds) / 1e12
    unet = UNet(SD2["unet"]).requires_grad_(False)
    tflop = policy_tflop(512)[0]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(torch.randn(1, 16, 64, 64), 0, torch.randn(1, 2, 1024))
        times.append(1e3 * (time.perf_counter() - start))
    ms = min(times)
    if tuple(v.shape) != (1, 12, 64, 64) or not v.isfinite().all():
        raise ValueError(f"bench.system: the full-size U-Net gave {tuple(v.shape)}, finite {v.isfinite().all()}")
    bench.rows.append(Row(
        "policy", "U-Net forward, 1 state, 512 px, full size, bf16 autocast, on the CPU", "1 state", ms, ms, max(times),
        tflop, tflop / tflops * 1e3 / ms, note="best of three, with the casts of the weights; best of five products of "
        f"matrices: {tflops:.2f} TFLOP/s"))


def policy_part(bench):
    """Rollout and update of one photo, eager, beside the same loop with diffusers."""
    if bench.dry:
        cpu_row(bench)
    for full, px in zip(GPU.sides, bench.sizes.sides, strict=True):
        forward_rows(bench, full, px)
        step = Step(bench, px)
        if diffusers:
            bench.peer_ms[full] = bench.attempt(f"policy: rollout and update, {full} px: diffusers",
                                                make=functools.partial(peer_call, step, bench), runs=3)[0][0]
        rollout_row(bench, full, step, "eager")
        del step
        bench.clear()


def rollout_row(bench, full, step, way):
    """Row of a rollout and its update; the row's name says `full` px."""
    bench.add(Row("policy", f"rollout and update, {full} px, G = {GPU.group}, T = {GPU.steps}: {way}", "1 photo",
                  tflop=policy_tflop(full)[1], least=0.45, instead="the same loop with diffusers, eager",
                  instead_ms=bench.peer_ms.get(full), least_times=1.5), step.gradient, runs=3)


def step_row(bench, what, call, judge_tflop=0, **more):
    """Row of a whole GRPO step at 512 px, and what it means for the paper's run; judge_tflop: of the answers asked."""
    tflop = policy_tflop(512)[1] + judge_tflop
    row = bench.add(Row("step", f"whole step, 512 px, {what}", "1 photo", tflop=tflop, **more), call, runs=3)
    if row.ms:
        row.note = f"{row.ms / 1e3:.2f} s a photo; 10,000 photos x 3 epochs: {row.ms / 1e3 * 30_000 / 3600:.1f} hours"
    return row


def compiled_policy_part(bench):
    """Rollout and whole step with --compile; they come late, since compiling takes minutes."""
    step = Step(bench, bench.sizes.sides[0], "--compile")
    rollout_row(bench, GPU.sides[0], step, "--compile")
    step_row(bench, "banked answers, --compile", step.update)
