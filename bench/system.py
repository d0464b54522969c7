"""Figures of the whole system on one GPU: time beside the arithmetic limit and beside what one would do instead.

    python -m bench.system --all --json FILE        every part, under 9 minutes; prints the tables of bench/RESULTS.md
    python -m bench.system --part memory            one part: kernels, judge, policy, step, memory

Weights are random: speed does not depend on them. The limit is operations (counted on tensors without data)
over the rate of a matrix product, for kernels bytes over the rate of a copy, rates of the same run. Without a GPU every
code path runs once at a tiny size, the full-size U-Net once on the CPU, and every other figure reads "not run".
"""
import contextlib
import functools
import gc
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from bench import arithmetic
from bench import kernels as kernel_bench
from bench.arithmetic import GB, JUDGE, SD2, counted
from bench.kernels import FAILURES, NOT_RUN, table
from bench.peer import Peer, diffusers
from data.bank import Judgements
from grpo import advantage, draw_batch, policy_gradient, sample_groups, score
from judge import Judge
from models import marigold, vlm
from models.copies import Networks
from models.mini_judge import IMG, mini_tokenizer
from runtime import config, files, ranks
from runtime.command import run_command
from runtime.run import about, optimizers

PARTS = ("kernels", "judge", "policy", "step", "memory")
MINUTES = 8.5                     # of a run: rows that are not begun by then read "not run"
COMPILING = 4                     # minutes that must be left for what is compiled
TINY_SD2 = SD2 | dict(
    unet=SD2["unet"] | dict(
        layers_per_block=1, block_out_channels=[32, 64], attention_head_dim=[2, 4], norm_num_groups=8,
        cross_attention_dim=24, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]),
    vae=SD2["vae"] | dict(layers_per_block=1, block_out_channels=[16, 32, 32, 32], norm_num_groups=8))
TINY_JUDGE = JUDGE | dict(
    force_image_size=56,
    vision_config=JUDGE["vision_config"] | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                num_attention_heads=2),
    llm_config=JUDGE["llm_config"] | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                          num_attention_heads=2, vocab_size=512))
PROMPT = 440                      # tokens of image, system text and one question with the published tokenizer


@dataclass(frozen=True)
class Sizes:
    """What is measured on a GPU; or, at a tiny size, only run."""

    sd2: dict
    judge: dict
    prompt: int               # tokens of one question with its image
    sides: tuple              # px of the photos of the policy
    group: int
    steps: int                # T; the tiny one divides 1000, where diffusers' steps end as ours do
    pairs: int
    batches: tuple            # marked images that the judge sees at once
    matrix: int               # side of the matrices whose product gives the rate
    cut: int                  # the kernels' sizes are divided by it
    runs: int                 # timed calls


GPU = Sizes(SD2, JUDGE, PROMPT, (512, 768), 8, 15, 40, (8, 32, 128), 8192, 1, 5)
TINY = Sizes(TINY_SD2, TINY_JUDGE, 60, (32, 48), 2, 5, 4, (1, 2, 3), 64, 64, 1)    # rows keep the names of the others


@dataclass
class Row:
    """One measurement. Times in ms of a call (median, least, greatest); None: not run."""

    part: str
    what: str
    unit: str = ""                # what one call makes, "8 answers"
    ms: float = None
    low: float = None
    high: float = None
    tflop: float = None           # of a call, at full size
    of_limit: float = None        # limit / time
    instead: str = ""             # what one would do otherwise
    instead_ms: float = None
    least: float = None           # goal for of_limit
    least_times: float = None     # goal for instead_ms / ms
    note: str = ""

    @property
    def times(self):
        """How many times faster than `instead`."""
        return self.instead_ms / self.ms if self.ms and self.instead_ms else None

    def goal(self):
        """The goals and whether they are reached, in words."""
        words = []
        for least, got, form in ((self.least, self.of_limit, "{:.0%} of the limit"),
                                 (self.least_times, self.times, "{:g} times")):
            if least:
                words.append(f"{form.format(least)}: {NOT_RUN if got is None else 'yes' if got >= least else 'missed'}")
        return ", ".join(words) or "-"


class Bench:
    """The rows of one run, its rates, and its deadline. On a CPU functions run once and nothing is timed."""

    def __init__(self, device, minutes=MINUTES):
        self.device, self.dry = device, device.type == "cpu"
        self.sizes = TINY if self.dry else GPU
        self.rows, self.memory, self.kernels, self.failed = [], [], {}, []
        self.judge, self.others = None, {}                                      # for later parts
        self.tflops = self.copy = None                                          # rates: TFLOP/s in bf16, GB/s
        self.deadline = time.monotonic() + 60 * minutes

    def clock(self, fn, runs=None):
        """Median, least and greatest ms of a call after one that is not counted; on a CPU one call, (None, ...)."""
        fn()
        if self.dry:
            return None, None, None
        times = []
        for _ in range(runs or self.sizes.runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times), min(times), max(times)

    def attempt(self, what, make, runs=None):
        """clock(make()) and ""; or (None, None, None) and why: time, memory, a compiler. It costs no other row."""
        if time.monotonic() > self.deadline:
            return (None, None, None), "no time was left"
        print(what, file=sys.stderr, flush=True)
        try:
            return self.clock(make(), runs), ""
        except FAILURES as error:
            if self.dry:
                raise
            self.failed.append(what)
            return (None, None, None), " ".join(f"failed: {type(error).__name__}: {error}".split())[:200]
        finally:
            self.clear()

    def add(self, row, make, runs=None):
        """Measure make() -> function of no arguments, and keep the row."""
        (row.ms, row.low, row.high), why = self.attempt(f"{row.part}: {row.what}", make, runs)
        row.note = why or row.note
        if row.ms and row.tflop:
            row.of_limit = row.tflop / self.tflops * 1e3 / row.ms
        self.rows.append(row)
        return row

    def clear(self):
        """Give back what no row needs any more."""
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def born(device, dtype=torch.float32):
    """Context in which new tensors lie on a device and have a dtype."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def tflop(fn):
    """Floating-point operations of a call, in TFLOP."""
    return counted(fn) / 1e12


def rates(bench):
    """Rate of a bf16 matrix product and of a copy: what the limits are made of."""
    n = bench.sizes.matrix
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    target = torch.empty_like(a)
    product, copy = (bench.clock(fn, 20)[0] for fn in (lambda: a @ b, lambda: target.copy_(a)))
    if product:
        bench.tflops, bench.copy = 2 * n**3 / product / 1e9, 2 * a.nbytes / copy / 1e6


# judge ------------------------------------------------------------------------------------------------------------

def build_judge(sizes, device="cpu"):
    """A random judge of InternVL2.5-4B's architecture in bf16 (tiny: fp32), its prompt as long as the published one's.

    The tokenizer knows one token a word; words of the system text make up for what Qwen2's splits finer.
    """
    tokenizer, made = mini_tokenizer(whole_questions=False), vlm.native_config(sizes.judge)
    vlm.set_tile(made)
    made.image_token_id = tokenizer.convert_tokens_to_ids(IMG)
    with born(device, torch.bfloat16 if sizes is GPU else torch.float32):
        network = vlm.InternVLForConditionalGeneration(made).requires_grad_(False)
        short = Judge(network, tokenizer, system="system")
        words = sizes.prompt - len(short.prompt.head) - len(short.prompt.blocks["depth"]) + 1
        return Judge(network, tokenizer, system=" ".join(["system"] * max(1, words))).eval()


def judge_part(bench):
    """Answers by batch against generated ones, four questions behind one image against four prefills."""
    sizes = bench.sizes
    with FakeTensorMode(), torch.no_grad():
        fake = build_judge(GPU)
        one = torch.empty(1, 3, fake.size, fake.size)
        single, packed = tflop(lambda: fake.prefill(one, ["depth"])), tflop(lambda: fake.logits(one))
    with torch.no_grad():
        judge = build_judge(sizes, bench.device)
        rgb = torch.rand(max(sizes.batches), 3, judge.size, judge.size, device=bench.device)
        spoken = bench.add(Row("judge", "`generate` of 20 tokens, one image at a time", "1 answer"),
                           lambda: lambda: judge.say(rgb[:1], "depth", tokens=20), runs=3)
        for N, n in zip(GPU.batches, sizes.batches, strict=True):
            bench.add(Row("judge", f"one forward pass, batch {N}", f"{N} answers", tflop=single * N, least=0.45,
                          instead="`generate`, one by one", instead_ms=spoken.ms and N * spoken.ms, least_times=50),
                      lambda n=n: lambda: judge.prefill(rgb[:n], ["depth"] * n))
        N, n = GPU.batches[1], sizes.batches[1]
        apart = bench.attempt("judge: four prefills", lambda: lambda: [judge.prefill(rgb[:n], [m] * n)
                                                                       for m in judge.prompt.blocks])[0][0]
        bench.add(Row("judge", f"four questions behind one image, batch {N}", f"{4 * N} answers", tflop=packed * N,
                      instead="four prefills", instead_ms=apart, least_times=2.5),
                  lambda: lambda: judge.logits(rgb[:n]))
        pts = torch.randint(judge.size, (1, sizes.pairs, 2, 2), device=bench.device)
        bench.add(Row("judge", f"bank: a photo, {GPU.pairs} pairs, four questions each", f"{4 * GPU.pairs} answers",
                      tflop=packed * GPU.pairs, instead="`generate`, one by one",
                      instead_ms=spoken.ms and 4 * GPU.pairs * spoken.ms), lambda: lambda: judge.ask(rgb[:1], pts))
    bench.judge = judge, packed
    return bench.judge


# policy -----------------------------------------------------------------------------------------------------------

def build_policy(sizes, device):
    """A random Marigold of the public sizes: lighting, three targets."""
    with torch.device(device):
        unet, vae = marigold.UNet(sizes.sd2["unet"]), marigold.VAE(sizes.sd2["vae"])
        text = torch.randn(1, 2, sizes.sd2["unet"]["cross_attention_dim"])
    return marigold.Marigold(unet, vae, marigold.Schedule(sizes.sd2["scheduler"]), text, sizes.sd2["index"]).eval()


class Step:
    """One photo's GRPO step as train.train_grpo takes it: the paper's settings, random photo and answers.

    It stands in for a run: `backward` gathers the gradient, `fail` is an error
    """

    def __init__(self, bench, px, *flags):
        sizes, device = bench.sizes, bench.device
        self.cfg = config.parse([
            "--preset", "paper", "--stage", "grpo", "--policy", "P", "--judge", "J", "--images", "I", "--batch", "1",
            "--size", str(px), "--group", str(sizes.group), "--sample-steps", str(sizes.steps), "--pairs",
            str(sizes.pairs), "--bank-pairs", str(sizes.pairs), "--exploration", "ddim",
            *(["--precision", "fp32"] if bench.dry else []), *flags])[1]
        self.device = device
        self.nets = Networks(lambda: build_policy(sizes, device), self.cfg, device)
        self.opts = optimizers([self.nets.policy], self.cfg.lr, 0, weight_decay=0.0, betas=(0.9, 0.95))
        self.judged = Judgements(torch.randint(256, (1, 3, px, px), dtype=torch.uint8),
                                 torch.randint(px, (1, sizes.pairs, 2, 2)), torch.rand(1, sizes.pairs, 4), ["photo"])

    def explore(self, prob=None):
        """Batch, transitions and advantage of a rollout."""
        judged = self.judged if prob is None else replace(self.judged, prob=prob)
        draw = ranks.Draw(torch.Generator().manual_seed(0), 1)
        batch = draw_batch(judged, self.nets.policy.modalities, self.cfg, draw, self.device)
        maps, transitions = sample_groups(self.nets.actor, batch)
        scored = {m: score(maps, batch, m) for m in maps}
        self.check(maps | {f"{m} reward": one.reward for m, one in scored.items()})
        return batch, transitions, advantage(scored, batch, transitions)

    @staticmethod
    def check(values):
        """Wait for what Run.check looks at; numbers of random weights may be any."""
        torch.stack([x.isfinite().all() for x in values.values()]).tolist()

    def backward(self, share):
        """As Run.backward: the host waits for each loss."""
        self.check(dict(loss=share.detach()))
        share.backward()

    @staticmethod
    def fail(text):
        """As Run.fail of a run that is alone."""
        raise ValueError(f"bench.system: {text}")

    def gradient(self, prob=None):
        """Rollout and update: the gradient of one step."""
        for p in self.nets.params:
            p.grad = None
        policy_gradient(self.nets, *self.explore(prob), self)

    def whole(self, prob=None):
        """The gradient, its norm clipped, AdamW, the average, the acting copy."""
        self.gradient(prob)
        torch.nn.utils.clip_grad_norm_(self.nets.params, 1.0).item()
        for opt in self.opts:
            opt.step()
        self.nets.follow(1000)


def peer_call(step, bench):
    """The other loop's call, on the draws of one of our rollouts. raises ValueError: tiny, its gradient is another."""
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
            gap, size = (p.grad - theirs[name].grad).abs().max(), theirs[name].grad.abs().max()
            if not gap <= 1e-3 * size + 1e-7:
                raise ValueError(f"bench.system: gradient of {name}: ours and the loop with diffusers differ by {gap:.2e} "
                                 f"of {size:.2e}")
    return call


@functools.cache
def policy_tflop(px):
    """Operations at full size: (one forward pass of a state, rollout and update of a photo)."""
    with torch.device("meta"):
        unet = marigold.UNet(SD2["unet"])
        x, text = torch.empty(1, 16, px // 8, px // 8), torch.empty(1, 2, 1024)
    with torch.enable_grad():
        both = tflop(lambda: unet(x, 0, text).sum().backward())
    with torch.no_grad():
        once = tflop(lambda: unet(x, 0, text))
        with FakeTensorMode():
            vae = marigold.VAE(SD2["vae"])
            seen = tflop(lambda: vae.encode(torch.empty(1, 3, px, px)))
            shown = tflop(lambda: vae.decode(torch.empty(1, 4, px // 8, px // 8)))
    G, states = GPU.group, 1 + GPU.group * (GPU.steps - 2)                      # trained; a group shares the first one
    return once, 3 * seen + G * shown + once * (states + G) + (once + both) * states


def forward_rows(bench, full, px):
    """One forward pass of a group through the network that acts, in its ways; `full` px, of which `px` are run."""
    sizes, side = bench.sizes, px // 8
    kind = bench.device, torch.float32 if bench.dry else torch.bfloat16
    with born(*kind):
        unet = marigold.UNet(sizes.sd2["unet"]).requires_grad_(False)
        text, x = torch.randn(1, 2, sizes.sd2["unet"]["cross_attention_dim"]), torch.randn(sizes.group, 16, side, side)
        t = torch.zeros(())                                                     # on the device: a graph copies nothing

    def peer():
        with born(*kind):
            net = diffusers.UNet2DConditionModel(**sizes.sd2["unet"])
        many = text.expand(len(x), -1, -1)
        return lambda: net(x, t, many).sample

    def plain():
        return lambda: unet(x, t, text)

    def graph():
        unet(x, t, text)                                                        # libraries choose before the recording
        if bench.dry:
            return plain()
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            unet(x, t, text)
        return recorded.replay

    def compiled():
        fast = torch.compile(unet.to(memory_format=torch.channels_last), dynamic=False)
        return lambda: fast(x, t, text)

    ways = {"eager": plain, "CUDA graph": graph, "channels last": lambda: unet.to(
        memory_format=torch.channels_last) and plain(), "torch.compile, channels last": compiled}
    with torch.no_grad():
        other = diffusers and bench.attempt(f"policy: U-Net forward, {full} px: diffusers", peer)[0][0]
        for way, make in ways.items() if px == sizes.sides[0] else [("eager", plain)]:
            bench.add(Row("policy", f"U-Net forward, {full} px: {way}", f"{GPU.group} states",
                          tflop=policy_tflop(full)[0] * GPU.group, instead="diffusers, eager", instead_ms=other), make)


def on_cpu(bench):
    """One forward pass of the full-size U-Net on the CPU, in bf16, beside the CPU's own rate of a matrix product."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    tflops = 2 * 2048**3 / min(seconds) / 1e12
    unet, times, tflop = marigold.UNet(SD2["unet"]).requires_grad_(False), [], policy_tflop(512)[0]
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
        on_cpu(bench)
    for full, px in zip(GPU.sides, bench.sizes.sides, strict=True):
        forward_rows(bench, full, px)
        step = Step(bench, px)
        bench.others[full] = diffusers and bench.attempt(
            f"policy: rollout and update, {full} px: diffusers", functools.partial(peer_call, step, bench), 3)[0][0]
        loop_row(bench, full, step, "eager")
        del step
        bench.clear()


def loop_row(bench, full, step, way):
    """Row of a rollout and its update."""
    bench.add(Row("policy", f"rollout and update, {full} px, G = {GPU.group}, T = {GPU.steps}: {way}", "1 photo",
                  tflop=policy_tflop(full)[1], least=0.45, instead="the same loop with diffusers, eager",
                  instead_ms=bench.others.get(full), least_times=1.5), lambda: step.gradient, runs=3)


def compiled_policy(bench):
    """The same compiled; late, since compiling takes minutes."""
    step = Step(bench, bench.sizes.sides[0], "--compile")
    loop_row(bench, GPU.sides[0], step, "--compile")
    whole_row(bench, "banked answers, --compile", step.whole, policy_tflop(512)[1])


def compiled_judge(bench):
    """Row of a judge whose vision tower and language model are compiled, beside itself in eager."""
    judge, core, n = bench.judge[0], bench.judge[0].model.model, bench.sizes.batches[1]
    eager = next(r for r in bench.rows if r.what == f"one forward pass, batch {GPU.batches[1]}")
    rgb = torch.rand(n, 3, judge.size, judge.size, device=bench.device)
    for net in (core.vision_tower, core.language_model):
        net.compile(dynamic=False)
    with torch.no_grad():
        bench.add(Row("judge", f"{eager.what}: torch.compile", eager.unit, tflop=eager.tflop, least=0.45,
                      instead="eager, as above", instead_ms=eager.ms),
                  lambda: lambda: judge.prefill(rgb, ["depth"] * n))


def whole_row(bench, what, call, tflop, **more):
    """Row of a whole GRPO step, and what it means for the paper's run."""
    row = bench.add(Row("step", f"whole step, 512 px, {what}", "1 photo", tflop=tflop, **more), lambda: call, runs=3)
    if row.ms:
        row.note = f"{row.ms / 1e3:.2f} s a photo; 10,000 photos x 3 epochs: {row.ms / 1e3 * 30_000 / 3600:.1f} hours"
    return row


def step_part(bench):
    """A GRPO step of the paper's settings on one GPU: rollout, reward, update, AdamW, average."""
    px, tflop = bench.sizes.sides[0], policy_tflop(512)[1]
    step = Step(bench, px)
    banked = whole_row(bench, "banked answers", step.whole, tflop)
    judge, asked = bench.judge or judge_part(bench)
    rgb = torch.rand(1, 3, judge.size, judge.size, device=bench.device)
    pts = torch.randint(judge.size, (1, bench.sizes.pairs, 2, 2), device=bench.device)
    spoken = next(r.ms for r in bench.rows if r.part == "judge" and r.unit == "1 answer")
    naive = spoken and banked.ms and banked.ms + GPU.group * GPU.pairs * spoken
    whole_row(bench, "the judge asked anew", lambda: step.whole(judge.ask(rgb, pts)), tflop + GPU.pairs * asked,
              instead="the judge generates for every sample and pair (extrapolated)", instead_ms=naive)


def kernels_part(bench):
    """bench.kernels: every kernel against its definition, then timed; tiny: compared only. And the step of `small`."""
    kernels.use("auto")
    if bench.dry:
        kernel_bench.check_all(kernel_bench.OPS, bench.device, bench.sizes.cut)
        bench.kernels = dict(kernels=[dict(op=op, eager=NOT_RUN, compile=NOT_RUN, triton=NOT_RUN)
                                      for op in kernel_bench.OPS])
        return
    bench.kernels = kernel_bench.on_gpu(kernel_bench.OPS, bench.copy)
    bench.failed += [f"{r['op']}, {r['case']}" for r in bench.kernels["kernels"] if "failed" in r]
    bench.kernels["grpo_step"] = kernel_bench.whole_step(bench.device)


# memory -----------------------------------------------------------------------------------------------------------

def memory_part(bench):
    """The computed table; on a GPU beside the peak of a GRPO step, one state at a time, over what other parts hold.

    Of the second step: in the first one AdamW has no averages yet while activations are there.
    """
    bench.memory = [dict(row) for row in arithmetic.table()]
    for row in bench.memory:
        px = bench.sizes.sides[GPU.sides.index(row["px"])]
        if time.monotonic() > bench.deadline or bench.dry and row["px"] != GPU.sides[0]:    # tiny: the same paths
            continue
        flags = ["--micro", "1", "--sample-steps", "3", "--checkpointing", str(int(row["checkpointing"]))]
        held = 0 if bench.dry else torch.cuda.memory_allocated()                # a judge of another part
        step = Step(bench, px, *flags, *(["--lora", "16"] if row["training"] != "full" else []))
        step.whole()
        if not bench.dry:
            torch.cuda.reset_peak_memory_stats()
            step.whole()
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - held) / GB
        del step
        bench.clear()


# output -----------------------------------------------------------------------------------------------------------

def shown(value, form):
    """A figure, or "not run"."""
    return NOT_RUN if value is None else format(value, form)


def render(found):
    """The tables of a run's JSON as markdown."""
    about, parts = found["about"], []
    parts.append(f"`{about['command']}`; {about['device']}; torch {about['torch']}, transformers "
                 f"{about['transformers']}, Python {about['python']}; commit {about['commit']}.\n\n"
                 f"Rates of the same run: bf16 matrix product {shown(found['tflops'], '.0f')} TFLOP/s, copy "
                 f"{shown(found['copy'], '.0f')} GB/s.")
    rows = [Row(**r) for r in found["rows"]]
    if rows:
        parts.append(table(
            ("part", "what", "a call makes", "ms (least to greatest)", "TFLOP", "of the limit", "instead", "ms",
             "times faster", "goal", "note"),
            [(r.part, r.what, r.unit or "-", NOT_RUN if r.ms is None else f"{r.ms:.4g} ({r.low:.4g} to {r.high:.4g})",
              "-" if r.tflop is None else f"{r.tflop:.4g}", shown(r.of_limit, ".0%") if r.tflop else "-",
              r.instead or "-", shown(r.instead_ms, ".4g") if r.instead else "-",
              shown(r.times, ".2f") if r.instead else "-",
              r.goal(), r.note or "-") for r in rows]))
    if found["kernels"]:
        parts.append(kernel_bench.render(found["kernels"]))
    if found["memory"]:
        parts.append("GB of GRPO on one GPU, one state at a time, computed; and the measured peak.\n\n" + table(
            ("px", "training", "checkpointing", "weights, AdamW, average", "activations", "together", "card",
             "+ judge resident", "card", "measured peak"),
            [(r["px"], r["training"], "yes" if r["checkpointing"] else "no", f"{r['state_gb']:.1f}",
              f"{r['activations_gb']:.1f}", f"{r['total_gb']:.1f}", r["card_gb"], f"{r['with_judge_gb']:.1f}",
              r["with_judge_card_gb"], shown(r["peak_gb"], ".1f")) for r in found["memory"]]))
    return "\n\n".join(parts)


RUN = {"judge": judge_part, "policy": policy_part, "step": step_part, "memory": memory_part, "kernels": kernels_part,
       "policy, compiled": compiled_policy, "judge, compiled": compiled_judge}


def main(argv=None):
    """Command line."""
    p = config.Parser(prog="bench.system", allow_abbrev=False, description=__doc__.splitlines()[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="every part")
    what.add_argument("--part", choices=PARTS, help="one part")
    p.add_argument("--json", default="", help="file for every printed number")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    p.add_argument("--kernels", choices=("auto", "torch"), default="auto", help="of the policy's rows [auto]")
    p.add_argument("--minutes", type=float, default=MINUTES, help=f"rows not begun by then are left out [{MINUTES}]")
    args = p.parse_args(argv)
    bench = Bench(ranks.pick_device(args.device, "bench.system"), args.minutes)
    began = time.monotonic()
    torch.compiler.set_stance("force_eager" if bench.dry else "default")        # tiny: compiling is what tests do
    rates(bench)
    chosen, found = [name for name in RUN if args.all or name.split(",")[0] == args.part], None
    for name in chosen:
        if "compiled" in name and bench.deadline - time.monotonic() < 60 * COMPILING and not bench.dry:
            bench.deadline = 0                                                  # its rows say so
        kernels.use(args.kernels)
        try:
            RUN[name](bench)
        except FAILURES as error:                                               # outside of a row
            if bench.dry:
                raise
            bench.failed.append(f"{name}: {error}")
        bench.clear()
        found = dict(about=about(), dry=bench.dry, minutes=(time.monotonic() - began) / 60,
                     tflops=bench.tflops, copy=bench.copy, rows=[asdict(r) for r in bench.rows], memory=bench.memory,
                     kernels=bench.kernels, failed=bench.failed)
        if args.json:                                                           # what there is, should time run out
            files.write_json(args.json, found)
    torch.compiler.set_stance("default")
    print(render(found))
    if bench.failed:
        raise config.UserError(f"{len(bench.failed)} failed: {'; '.join(bench.failed)}")


if __name__ == "__main__":
    run_command(main, "bench.system")
