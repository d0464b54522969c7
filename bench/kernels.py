"""Each kernel against its reference: equal first, then eager, torch.compile and Triton on a GPU; the GRPO step last.

    python -m bench.kernels [--op NAME] [--json FILE]
    compute-sanitizer python -m bench.kernels --check        small cases, compared only

Without a GPU it measures the vectorised relation against a loop over pairs (what the released judge code does) and the
eager GRPO step, and says that the kernels were not run. Medians with the 20th and 80th percentile.
"""
import statistics
import sys
import time
from types import SimpleNamespace

import numpy
import torch

import grpo
import kernels
from bench.arithmetic import predict_eager, predict_ms
from bench.cases import OPS, random_points
from bench.measure import FAILURES, NOT_RUN, markdown_table
from data.bank import Judgements
from models.dit import DiT, DiTConfig
from relations import LUMA, MODALITIES, SAME_ALBEDO, relation, sample_pairs
from runtime.command import run_command
from runtime.files import write_json
from runtime.flags import Parser, parse
from runtime.ranks import Draw
from runtime.run import about

LOOP_PAIRS = 100_000              # that the loop is timed on; its time is scaled to the pairs of the vectorised form
COLUMNS = ("op", "case", "eager ms", "torch.compile ms", "Triton ms", "GB/s", "of copy", "launches (eager)",
           "peak MB (eager)")


def assert_equal(label, got, want):
    """All but 1e-5 of the elements agree to 1e-4 of the largest (bf16: 2^-6): an ulp at a threshold is an answer."""
    for g, w in zip(got, want, strict=True):
        tol = (2**-6 if w.dtype == torch.bfloat16 else 1e-4) * max(w.abs().max().item(), 1e-3)
        wrong = (~((g.float() - w.float()).abs() <= tol)).float().mean().item()  # NaN is wrong
        if not wrong <= 1e-5:
            raise ValueError(f"bench.kernels: {label}: {wrong:.2e} of the elements differ from the reference")


def bind(case, fn):
    """A function of no arguments: forward, or forward and backward."""
    if case.into < 0:
        return lambda: [z for z in _as_list(fn(*case.args)) if z is not None]
    args = list(case.args)
    args[case.into] = leaf = args[case.into].detach().requires_grad_()

    def both():
        out = _as_list(fn(*args))
        return [*(z.detach() for z in out), *torch.autograd.grad(out, leaf, [torch.ones_like(z) for z in out])]
    return both


def _as_list(out):
    return list(out) if isinstance(out, tuple) else [out]


def time_call(fn):
    """Median, 20th and 80th percentile in ms, launches and peak MB of one call on the GPU."""
    fn()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn()
        torch.cuda.synchronize()
    launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    peak = (torch.cuda.max_memory_allocated() - held) / 1e6
    median, low, high = kernels.triton.testing.do_bench(fn, warmup=50, rep=200, quantiles=(0.5, 0.2, 0.8))
    return dict(ms=median, low=low, high=high, launches=launches, peak_mb=peak)


def check(op, case):
    """A kernel's and its reference's calls, after they gave the same. raises ValueError."""
    kernel = bind(case, case.kernel)
    eager = bind(case, case.ref)
    assert_equal(f"{op}, {case.label}", kernel(), eager())
    return kernel, eager


def check_all(ops, device, cut=64):
    """Compare the kernels with their references on small cases; returns how many. raises ValueError."""
    found = [check(op, case) for op in ops for case in OPS[op](device, cut)]
    return len(found)


def kernel_row(op, case, copy_speed):
    """One row: equality first, then the times of the three ways."""
    kernel, eager = check(op, case)
    torch._dynamo.reset()
    compiled = bind(case, torch.compile(case.ref, dynamic=False))
    ways = dict(eager=time_call(eager), compile=time_call(compiled), triton=time_call(kernel))
    speed = case.bytes / ways["triton"]["ms"] / 1e6
    return dict(op=op, case=case.label, **ways, gb_per_s=speed, of_copy=speed / copy_speed)


def copy_bandwidth():
    """GB/s of a device copy of 512 MB, read and written."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_call(lambda: target.copy_(source))["ms"] / 1e6


def time_grpo_step(device, preset, repeats):
    """Seconds of one GRPO step (rollout, rewards, credit, loss, backward) of a preset, random weights and answers."""
    cfg = parse(["--preset", preset])[1]
    rng = torch.Generator().manual_seed(0)
    policy = DiT(DiTConfig.of(cfg), seed=0).to(device)
    photos = torch.randint(256, (cfg.batch, 3, cfg.size, cfg.size), generator=rng, dtype=torch.uint8)
    pts = sample_pairs(cfg.batch, (cfg.size, cfg.size), cfg.bank_pairs, rng)
    prob = torch.rand(cfg.batch, cfg.bank_pairs, 4, generator=rng)
    judged = Judgements(photos, pts, prob, [""] * cfg.batch)
    nets = SimpleNamespace(policy=policy, reference=policy)
    run = SimpleNamespace(backward=lambda share: share.backward())
    seconds = []
    for i in range(repeats + 1):
        draw = Draw(torch.Generator().manual_seed(1), cfg.batch)
        batch = grpo.draw_batch(judged, policy.modalities, cfg, draw, device)
        policy.zero_grad()
        start = time.perf_counter()
        maps, transitions = grpo.sample_groups(policy, batch)
        scored = {m: grpo.score(maps, batch, m) for m in maps}
        advantage = grpo.advantage(scored, batch, transitions)
        loss = grpo.policy_gradient(nets, batch, transitions, advantage, run, update=1)["loss"].item()   # waits
        if i:
            seconds.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(seconds), low=min(seconds), high=max(seconds), loss=loss)


def loop_over_pairs(m, values, pairs):
    """Relations of one map, (H, W, C) numpy, pair by pair, as the released judge code labels its questions."""
    rule = MODALITIES[m].rule
    dead = MODALITIES[m].dead
    luma = numpy.array(LUMA, dtype=numpy.float32)
    answers = []
    if rule == "nearer":
        extent = values.max() - values.min()
    for (y0, x0), (y1, x1) in pairs:
        red = values[y0, x0]
        green = values[y1, x1]
        if rule == "same":
            answers.append(1 if numpy.linalg.norm(red - green) < SAME_ALBEDO else -1)
            continue
        if rule == "nearer":
            margin = (green[0] - red[0]) / extent
        elif rule == "facing":
            margin = (red[2] - green[2]) / 2
        elif rule == "brighter":
            margin = red @ luma - green @ luma
        else:
            margin = red[0] - green[0]
        answers.append(0 if abs(margin) < dead else 1 if margin > 0 else -1)
    return answers


def relation_rows(n=1_000_000, side=512):
    """CPU time of `relation` of n pairs at once, on one thread, and of the loop on LOOP_PAIRS of them, scaled."""
    rows = []
    threads = torch.get_num_threads()
    clock = time.process_time
    torch.set_num_threads(1)
    for m, modality in MODALITIES.items():
        values = torch.rand(modality.channels, side, side, generator=torch.Generator().manual_seed(0))
        pts = random_points(1, n, (side, side), "cpu")[0]
        few = pts[:LOOP_PAIRS].tolist()
        start = clock()
        looped = loop_over_pairs(m, values.movedim(0, -1).contiguous().numpy(), few)
        loop = (clock() - start) * n / len(few)
        times = []
        for _ in range(7):
            start = clock()
            answers = relation(values, pts, m)
            times.append(clock() - start)
        wrong = sum(a != b for a, b in zip(answers[:len(few)].tolist(), looped, strict=True))
        if wrong > 1:                                                           # fp32 rounding at a threshold
            raise ValueError(f"bench.kernels: {m}: {wrong} of {len(few)} relations differ from the loop's")
        median = statistics.median(times)
        low, high = numpy.quantile(times, (0.2, 0.8)).tolist()
        rows.append(dict(op="relation", case=f"{m}, {n:,} pairs", loop_ms=1e3 * loop, ms=1e3 * median, low=1e3 * low,
                         high=1e3 * high, speedup=loop / median))
    torch.set_num_threads(threads)
    return rows


def format_times(way):
    """Text of the median (20th to 80th percentile), in ms."""
    return f"{way['ms']:.3g} ({way['low']:.3g} to {way['high']:.3g})"


def kernel_rows(ops, copy_speed):
    """Rows of all cases on a GPU, copy_speed in GB/s; a case that fails costs no other."""
    rows = []
    for op in ops:
        for case in OPS[op](torch.device("cuda")):
            print(f"kernels: {op}, {case.label}", file=sys.stderr, flush=True)
            try:
                rows.append(kernel_row(op, case, copy_speed))
            except FAILURES as error:
                rows.append(dict(op=op, case=case.label, failed=" ".join(f"{type(error).__name__}: {error}".split())))
    return dict(copy_gb_per_s=copy_speed, kernels=rows)


def rows_not_run(ops):
    """Rows without a GPU: dict as `kernel_rows`, with what bytes and launches predict for an H100, ms."""
    rows = []
    for op in ops:
        for case in OPS[op]("meta") if op != "check_points" else ():           # which waits for its values
            predicted = dict(eager=predict_eager(bind(case, case.ref)),
                             triton=predict_ms(case.bytes, case.launches, case.cached))
            rows.append(dict(op=op, case=case.label, **dict.fromkeys(("eager", "compile", "triton"), NOT_RUN),
                             predicted=predicted))
    return dict(kernels=rows)


def grpo_step_rows(device):
    """Rows of the GRPO step with kernels off and, on a GPU, on."""
    preset, gpu = ("small", True) if device.type == "cuda" else ("mini", False)
    rows = []
    for mode, word in (("torch", "off"), ("auto", "on")):
        kernels.use(mode)
        row = time_grpo_step(device, preset, 9 if gpu else 3) if gpu or word == "off" else None
        rows.append(dict(preset=preset, kernels=word, **(row or dict(seconds=NOT_RUN))))
    kernels.use("auto")
    return rows


def kernel_cells(row):
    """Cells of a kernel's row."""
    if "failed" in row:
        return row["op"], row["case"], f"failed: {row['failed'][:100]}", *[NOT_RUN] * 6
    eager = row["eager"]
    triton = row["triton"]
    return (row["op"], row["case"], format_times(eager), format_times(row["compile"]), format_times(triton),
            f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}", f"{triton['launches']} ({eager['launches']})",
            f"{triton['peak_mb']:.0f} ({eager['peak_mb']:.0f})")


def step_cells(row):
    """Cells of a row of the GRPO step."""
    if "low" not in row:
        return row["preset"], row["kernels"], NOT_RUN, NOT_RUN
    return row["preset"], row["kernels"], f"{row['seconds']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"


def kernel_tables(found):
    """Tables of what was measured, as markdown."""
    parts = []
    if "copy_gb_per_s" in found:
        parts.append(f"copy: {found['copy_gb_per_s']:.0f} GB/s\n\n"
                     + markdown_table(COLUMNS, map(kernel_cells, found["kernels"])))
    elif found.get("kernels"):
        parts.append(f"{', '.join(dict.fromkeys(r['op'] for r in found['kernels']))}: {NOT_RUN} (no GPU)")
        predicted = [(r["op"], r["case"], *(f"{NOT_RUN} ({r['predicted'][k]:.3g})" for k in ("eager", "triton")))
                     for r in found["kernels"] if "predicted" in r]
        if predicted:
            parts.append(markdown_table(("op", "case", "eager ms (predicted)", "Triton ms (predicted)"), predicted))
    if "relation" in found:
        parts.append(markdown_table(
            ("relation, CPU time of one thread", "loop over pairs ms (scaled)", "vectorised ms", "times faster"),
            [(r["case"], f"{r['loop_ms']:.0f}", format_times(r), f"{r['speedup']:.0f}") for r in found["relation"]])
            + f"\n\nThe loop was timed on {LOOP_PAIRS:,} pairs and scaled.")
    if "grpo_step" in found:
        parts.append(markdown_table(("GRPO step, preset", "kernels", "s", "range"),
                                    map(step_cells, found["grpo_step"])))
    return "\n\n".join(parts)


def main(argv=None):
    """Command line."""
    p = Parser(prog="bench.kernels", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--op", default="all", choices=("all", *OPS, "relation", "grpo_step"), help="what to measure [all]")
    p.add_argument("--check", action="store_true", help="compare small cases with their definitions, time nothing")
    p.add_argument("--json", default="", help="file for every printed number")
    args = p.parse_args(argv)
    gpu = torch.cuda.is_available()
    found = dict(about=about(), triton=getattr(kernels.triton, "__version__", "none"),
                 threads=torch.get_num_threads())
    print(f"{found['about']['device']}, torch {torch.__version__}, {found['threads']} threads, {kernels.describe()}\n")
    ops = [op for op in OPS if args.op in ("all", op)]
    if args.check:
        n = check_all(ops, torch.device("cuda" if gpu else "cpu"))
        print(f"{n} cases agree with their definitions")
        return
    if ops and gpu:
        found |= kernel_rows(ops, copy_bandwidth())
    elif ops:
        found |= rows_not_run(ops)
    if args.op == "relation" or args.op == "all" and not gpu:
        found["relation"] = relation_rows()
    if args.op in ("all", "grpo_step"):
        found["grpo_step"] = grpo_step_rows(torch.device("cuda" if gpu else "cpu"))
    print(kernel_tables(found))
    if args.json:
        write_json(args.json, found)
    failed = [r["op"] for r in found.get("kernels", ()) if "failed" in r]
    if failed:
        raise ValueError(f"{len(failed)} cases failed: {', '.join(failed)}; see the table")


if __name__ == "__main__":
    run_command(main, "bench.kernels")
