"""Figures of the whole system on one GPU: time beside the arithmetic limit and beside what one would do instead.

    python -m bench.system --all --json FILE        every part, under 9 minutes; prints the tables of bench/RESULTS.md
    python -m bench.system --part memory            one part: kernels, judge, policy, step, memory

Weights are random: speed does not depend on them. The limit is operations (counted on tensors without data)
over the rate of a matrix product, for kernels bytes over the rate of a copy, rates of the same run. Without a GPU every
code path runs once at a tiny size, the full-size U-Net is timed on the CPU, and every other figure reads "not run".
"""
import time
from dataclasses import asdict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from bench import kernels as kernel_bench
from bench.arithmetic import GB, RANK, memory_table
from bench.measure import (
    FAILURES,
    GPU,
    MINUTES,
    NOT_RUN,
    Bench,
    Row,
    count_tflop,
    markdown_table,
    measure_rates,
    new_tensors,
)
from bench.policy import Step, compiled_policy_part, policy_part, step_row
from judge import Judge
from models import vlm
from models.mini_judge import IMG, mini_tokenizer
from runtime import config, files, ranks
from runtime.command import run_command
from runtime.flags import Parser
from runtime.run import about

PARTS = ("kernels", "judge", "policy", "step", "memory")
COMPILING = 4                     # minutes that must be left for what is compiled


def build_judge(sizes, device="cpu"):
    """A random judge of InternVL2.5-4B's architecture in bf16 (tiny: fp32), its prompt as long as the published one's.

    The tokenizer knows one token a word; words of the system text make up for what Qwen2's splits finer.
    """
    tokenizer = mini_tokenizer(whole_questions=False)
    network_config = vlm.native_config(sizes.judge)
    vlm.set_tile(network_config)
    network_config.image_token_id = tokenizer.convert_tokens_to_ids(IMG)
    with new_tensors(device, torch.bfloat16 if sizes is GPU else torch.float32):
        network = vlm.InternVLForConditionalGeneration(network_config).requires_grad_(False)
        short = Judge(network, tokenizer, system="system")
        words = sizes.prompt - len(short.prompt.head) - len(short.prompt.blocks["depth"]) + 1
        return Judge(network, tokenizer, system=" ".join(["system"] * max(1, words))).eval()


def judge_part(bench):
    """Answers by batch against generated ones, four questions behind one image against four prefills.

    returns  (judge, TFLOP of four answers about one marked image), as later parts find it in bench.judge
    """
    sizes = bench.sizes
    with FakeTensorMode(), torch.no_grad():
        fake = build_judge(GPU)
        one = torch.empty(1, 3, fake.size, fake.size)
        single_tflop = count_tflop(lambda: fake.decide(one, ("depth",)))
        packed_tflop = count_tflop(lambda: fake.decide(one))
    with torch.no_grad():
        judge = build_judge(sizes, bench.device)
        rgb = torch.rand(max(sizes.batches), 3, judge.size, judge.size, device=bench.device)
        spoken = bench.add(Row("judge", "`generate` of 20 tokens, one image at a time", "1 answer"),
                           lambda: judge.say(rgb[:1], "depth", tokens=20), runs=3)
        for N, n in zip(GPU.batches, sizes.batches, strict=True):
            bench.add(Row("judge", f"one forward pass, batch {N}", f"{N} answers", tflop=single_tflop * N, least=0.45,
                          instead="`generate`, one by one", instead_ms=spoken.ms and N * spoken.ms, least_times=50),
                      lambda n=n: judge.decide(rgb[:n], ("depth",)))
        N = GPU.batches[1]
        n = sizes.batches[1]
        apart_ms = bench.attempt("judge: four prefills", lambda: [judge.decide(rgb[:n], (m,))
                                                                  for m in judge.prompt.blocks])[0][0]
        bench.add(Row("judge", f"four questions behind one image, batch {N}", f"{4 * N} answers",
                      tflop=packed_tflop * N, instead="four prefills", instead_ms=apart_ms, least_times=2.5),
                  lambda: judge.decide(rgb[:n]))
        pts = torch.randint(judge.size, (1, sizes.pairs, 2, 2), device=bench.device)
        bench.add(Row("judge", f"bank: a photo, {GPU.pairs} pairs, four questions each", f"{4 * GPU.pairs} answers",
                      tflop=packed_tflop * GPU.pairs, instead="`generate`, one by one",
                      instead_ms=spoken.ms and 4 * GPU.pairs * spoken.ms), lambda: judge.ask(rgb[:1], pts))
    bench.judge = judge, packed_tflop
    return bench.judge


def compiled_judge_part(bench):
    """Row of a judge whose vision tower and language model are compiled, beside itself in eager."""
    judge = bench.judge[0]
    n = bench.sizes.batches[1]
    eager = next(r for r in bench.rows if r.what == f"one forward pass, batch {GPU.batches[1]}")
    rgb = torch.rand(n, 3, judge.size, judge.size, device=bench.device)
    for net in (judge.model.model.vision_tower, judge.model.model.language_model):
        net.compile(dynamic=False)
    with torch.no_grad():
        bench.add(Row("judge", f"{eager.what}: torch.compile", eager.unit, tflop=eager.tflop, least=0.45,
                      instead="eager, as above", instead_ms=eager.ms), lambda: judge.decide(rgb, ("depth",)))


def step_part(bench):
    """A GRPO step of the paper's settings on one GPU: rollout, reward, update, AdamW, average."""
    step = Step(bench, bench.sizes.sides[0])
    banked = step_row(bench, "banked answers", step.update)
    judge, asked_tflop = bench.judge or judge_part(bench)
    rgb = torch.rand(1, 3, judge.size, judge.size, device=bench.device)
    pts = torch.randint(judge.size, (1, bench.sizes.pairs, 2, 2), device=bench.device)
    spoken_ms = next(r.ms for r in bench.rows if r.part == "judge" and r.unit == "1 answer")
    naive_ms = spoken_ms and banked.ms and banked.ms + GPU.group * GPU.pairs * spoken_ms
    step_row(bench, "the judge asked anew", lambda: step.update(judge.ask(rgb, pts)), GPU.pairs * asked_tflop,
             instead="the judge generates for every sample and pair (extrapolated)", instead_ms=naive_ms)


def kernels_part(bench):
    """Compare every kernel with its definition, then time it and a step of preset `small`. On a CPU: compare only."""
    kernels.use("auto")
    if bench.dry:
        kernel_bench.check_all(kernel_bench.OPS, bench.device, bench.sizes.cut)
        bench.kernels = kernel_bench.rows_not_run(kernel_bench.OPS)
        return
    bench.kernels = kernel_bench.kernel_rows(kernel_bench.OPS, bench.copy)
    bench.failed += [f"{r['op']}, {r['case']}" for r in bench.kernels["kernels"] if "failed" in r]
    bench.kernels["grpo_step"] = kernel_bench.grpo_step_rows(bench.device)


def memory_part(bench):
    """The computed table; on a GPU beside the measured peak of a GRPO step, one state at a time.

    The peak is that of the second step: in the first one AdamW has no averages yet while activations are there.
    What other parts hold on the GPU is subtracted.
    """
    bench.memory = [dict(row) for row in memory_table()]
    for row in bench.memory:
        px = bench.sizes.sides[GPU.sides.index(row["px"])]
        if time.monotonic() > bench.deadline or bench.dry and row["px"] != GPU.sides[0]:    # tiny: the same paths
            continue
        flags = ["--micro", "1", "--sample-steps", "3", *["--checkpointing"] * row["checkpointing"]]
        held = 0 if bench.dry else torch.cuda.memory_allocated()                # a judge of another part
        step = Step(bench, px, *flags, *(["--lora", str(RANK)] if row["training"] != "full" else []))
        step.update()
        if not bench.dry:
            torch.cuda.reset_peak_memory_stats()
            step.update()
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - held) / GB
        del step
        bench.clear()


def format_figure(value, form):
    """A figure as text, or "not run"."""
    return NOT_RUN if value is None else format(value, form)


def row_cells(row):
    """Cells of a Row in the table of rows."""
    ms = NOT_RUN if row.ms is None else f"{row.ms:.4g} ({row.low:.4g} to {row.high:.4g})"
    tflop = "-" if row.tflop is None else f"{row.tflop:.4g}"
    of_limit = format_figure(row.of_limit, ".0%") if row.tflop else "-"
    instead_ms = format_figure(row.instead_ms, ".4g") if row.instead else "-"
    times = format_figure(row.times, ".2f") if row.instead else "-"
    return (row.part, row.what, row.unit or "-", ms, tflop, of_limit, row.instead or "-", instead_ms, times, row.goal(),
            row.note or "-")


def memory_cells(row):
    """Cells of a row of the memory table."""
    return (row["px"], row["training"], "yes" if row["checkpointing"] else "no", f"{row['state_gb']:.1f}",
            f"{row['activations_gb']:.1f}", f"{row['total_gb']:.1f}", row["card_gb"], f"{row['with_judge_gb']:.1f}",
            row["with_judge_card_gb"], format_figure(row["peak_gb"], ".1f"))


def system_tables(found):
    """The tables of a run's JSON as markdown."""
    about_run = found["about"]
    parts = [f"`{about_run['command']}`; {about_run['device']}; torch {about_run['torch']}, transformers "
             f"{about_run['transformers']}, Python {about_run['python']}; commit {about_run['commit']}.\n\n"
             f"Rates of the same run: bf16 matrix product {format_figure(found['tflops'], '.0f')} TFLOP/s, copy "
             f"{format_figure(found['copy'], '.0f')} GB/s."]
    if found["rows"]:
        parts.append(markdown_table(
            ("part", "what", "a call makes", "ms (least to greatest)", "TFLOP", "of the limit", "instead", "ms",
             "times faster", "goal", "note"), [row_cells(Row(**r)) for r in found["rows"]]))
    if found["kernels"]:
        parts.append(kernel_bench.kernel_tables(found["kernels"]))
    if found["memory"]:
        parts.append("GB of GRPO on one GPU, one state at a time, computed; and the measured peak.\n\n"
                     + markdown_table(
                         ("px", "training", "checkpointing", "weights, AdamW, average", "activations", "together",
                          "card", "+ judge resident", "card", "measured peak"), map(memory_cells, found["memory"])))
    return "\n\n".join(parts)


RUN = {"judge": judge_part, "policy": policy_part, "step": step_part, "memory": memory_part, "kernels": kernels_part,
       "policy, compiled": compiled_policy_part, "judge, compiled": compiled_judge_part}


def run_part(bench, name):
    """Run a part of RUN. What fails outside of a row is counted; on a CPU it is raised."""
    try:
        RUN[name](bench)
    except FAILURES as error:
        if bench.dry:
            raise
        bench.failed.append(f"{name}: {error}")
    bench.clear()


def main(argv=None):
    """Command line."""
    p = Parser(prog="bench.system", allow_abbrev=False, description=__doc__.splitlines()[0])
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
    measure_rates(bench)
    chosen = [name for name in RUN if args.all or name.split(",")[0] == args.part]
    found = None
    for name in chosen:
        if "compiled" in name and bench.deadline - time.monotonic() < 60 * COMPILING and not bench.dry:
            bench.deadline = 0                                                  # its rows say so
        kernels.use(args.kernels)
        run_part(bench, name)
        found = dict(about=about(), dry=bench.dry, minutes=(time.monotonic() - began) / 60,
                     tflops=bench.tflops, copy=bench.copy, rows=[asdict(r) for r in bench.rows], memory=bench.memory,
                     kernels=bench.kernels, failed=bench.failed)
        if args.json:                                                           # what there is, should time run out
            files.write_json(args.json, found)
    torch.compiler.set_stance("default")
    print(system_tables(found))
    if bench.failed:
        raise config.UserError(f"{len(bench.failed)} failed: {'; '.join(bench.failed)}")


if __name__ == "__main__":
    run_command(main, "bench.system")
