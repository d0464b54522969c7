"""Ablate GRPO: what each departure from the paper is worth at equal compute, beside losses that are not RL.

    python -m bench.ablate                               every row on seeds 0 1 2 of preset mini: table, plot, raw JSON
    python -m bench.ablate --seeds 7 --rows paper all    a quick look
A row is a set of train.py's flags: those of the row above it and its own. KL, replay, EMA, T, N and G are the preset's
in every row. All rows of a seed share its base predictor, judge and judgement bank, so the judge is asked once. Equal
compute: a row takes the number of steps that costs what `all` costs (within 10 %), counted in floating-point operations
of the row's first steps. Scores are of held-out `wild` and `synthetic` scenes, curves of validation scenes. Intervals
are over seeds, which share the scenes. The same command again goes on where it was interrupted.
"""
import json
import math
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import train
from bench import baselines
from bench.arithmetic import count_flops
from bench.measure import kept_figures
from data.album import judgements
from data.pools import scene_pool
from evaluation import report, scores, watch
from evaluation.page import update_page
from evaluation.plots import Line, figure
from predictor import load_predictor
from relations import NAMES
from runtime import files, ranks
from runtime.command import run_command
from runtime.config import ESTIMATORS, PRESETS, Config, plain_settings
from runtime.files import read_json
from runtime.flags import Parser, read_setting
from runtime.run import about

STEPS = [  # (row, flags that it adds to the row above)
    ("paper", ESTIMATORS["paper"] | dict(clip=1e-4)),
    ("+branch", dict(rollout="branch")),
    ("+pair", dict(credit="pair", norm="global", clip=0.1)),
    ("+soft", dict(reward="soft")),
    ("+joint", dict(modalities="joint")),
    ("+blocks", dict(noise_blocks=(1, 2, 4, 8), tail=1)),
    ("+brier", dict(reward="brier")),
    ("+jitter", dict(jitter=4, balance=True)),                                  # `all` has a higher learning rate too
]
BESIDE = {  # rows that start from the preset
    "all": {},
    "all, oracle judge": dict(judge="oracle", jitter=1),                        # its answers hold at the point alone
    "ranking loss": {},                                                         # other gradients: see `learn`
    "supervised": {},
}
SHOWN = ("depth/abs_rel", "albedo/whdr10", "irradiance/si_mse", "normal/angle")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def rows_of():
    """Flags of every row on top of a preset: dict name -> dict."""
    rows = {}
    flags = {}
    for name, more in STEPS:
        flags = {**flags, **more}
        rows[name] = flags
    return {**rows, **BESIDE}


def row_config(args, row, seed):
    """runtime.config.Config of one run."""
    shared = Path(args.out) / f"seed{seed}"
    run = dict(stage="grpo", seed=seed, device=args.device, policy=str(shared / "base"),
               judge=str(shared / "judge"), bank=str(shared / "bank"), band=0, forget=0,
               out=str(shared / row.replace(" ", "-").replace(",", "")))
    lr = dict(lr=args.paper_lr) if row in dict(STEPS) else {}
    return replace(Config(), **{**PRESETS[args.preset], **args.flags, **run, **rows_of()[row], **lr})


def learn(cfg, device, row):
    """Train a row: GRPO, or one of the baselines on the same batches."""
    ways = {}                                                                   # what takes the place of GRPO's parts
    if row == "ranking loss":
        ways = dict(sample=baselines.sample_nothing, gradient=baselines.ranking_gradient)
    if row == "supervised":
        truth = scene_pool("wild", "train", cfg.photos, cfg.size, device=device)
        ways = dict(sample=baselines.sample_nothing, gradient=baselines.supervised_gradient(truth))
    train.train_grpo(cfg, device, **ways)


def flops_per_step(cfg, device, row, steps=8):
    """Floating-point operations of a training step, those inside attention included; the mean of the first `steps`."""
    with TemporaryDirectory() as folder:
        own = replace(cfg, out=folder, eval_every=0, stop_at=steps)
        return count_flops(lambda: learn(own, device, row)) / steps


def prepare(args, seed):
    """Base predictor, judge and bank of a seed, and the cost of a step of each row: dict row -> flops."""
    cfg = row_config(args, "all", seed)
    out = Path(cfg.policy).parent
    shared = replace(cfg, out=str(out), policy="", judge="", bank="")
    device = ranks.setup(shared)
    torch.set_num_threads(args.threads)
    for stage in train.needed_stages(shared)[:-1]:
        train.STAGES[stage](replace(shared, stage=stage), device)
    judgements(cfg, train.named_judge(cfg, device), device, NAMES)
    path = out / "flops.json"
    known = read_json(path) if path.is_file() else {}
    for row in {"all", *args.rows}:
        own = row_config(args, row, seed)
        key = json.dumps({k: v for k, v in asdict(own).items() if k not in ("out", "steps")})
        if known.get(row, {}).get("settings") != key:
            known[row] = dict(settings=key, flops=flops_per_step(own, device, row))
            files.write_json(path, known)
    return {row: one["flops"] for row, one in known.items()}


def run_row(job):
    """Train one row of one seed and score it on held-out scenes; writes figures.json in its folder, or reads it."""
    args, row, seed, steps = job
    cfg = row_config(args, row, seed)
    cfg = replace(cfg, steps=steps, eval_every=max(1, steps // args.points))
    path = Path(cfg.out) / "figures.json"
    key = dict(settings=plain_settings(cfg), split=args.split)
    if path.is_file():
        return kept_figures(path, key)
    device = ranks.setup(cfg)
    torch.set_num_threads(args.threads)
    learn(cfg, device, row)
    before = load_predictor(cfg.policy).to(device)
    after = load_predictor(Path(cfg.out) / "grpo").to(device)
    figures = dict(row=row, seed=seed, steps=steps, photos=steps * cfg.batch, key=key,
                   about=about(), start=watch.diagnose(before, cfg.size, cfg.eval_steps, watch.validation_images(cfg)))
    for domain in ("wild", "synthetic"):
        maps = scene_pool(domain, args.split, cfg.eval_images, cfg.size).all()
        pairs = scores.eval_pairs(maps, scores.PAIRS, 1, 0)
        values = [scores.score_maps(scores.predict_maps(p, maps["rgb"], cfg.eval_steps, 0), maps, pairs)
                  for p in (before, after)]
        figures[domain] = report.compare_scores(*values)
    log = files.read_log(Path(cfg.out) / "grpo" / "metrics.jsonl")
    seconds = np.cumsum([r["time/step"] for r in log])
    figures["seconds"] = float(seconds[-1])
    figures["curve"] = curve(log, seconds, figures["start"], cfg.batch)
    files.write_json(path, figures)
    return figures


def curve(log, seconds, start, batch):
    """Points of a row's curve: photos, seconds and the relative change of each metric of SHOWN since the start."""
    evaluated = [(r, s) for r, s in zip(log, seconds, strict=True) if f"wild/{SHOWN[0]}" in r and r["step"]]
    return [dict(photos=(r["step"] + 1) * batch, seconds=float(s),
                 **{k: r[f"wild/{k}"] / start[f"wild/{k}"] - 1 for k in SHOWN}) for r, s in evaluated]


def interval(values):
    """Mean and half width of the 95 % interval over seeds (Student's t; nan for one seed)."""
    n = len(values)
    half = T_975.get(n - 1, 2.262) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else float("nan")
    return float(np.mean(values)), float(half)


def photos_for(points, metric, change):
    """Photos after which a curve first reaches a relative change (negative is better), interpolated; None: never.

    What the curve does before its first point is unknown: a change that the first point reaches takes all its photos.
    """
    last = None
    for point in points:
        if point[metric] <= change:
            if last is None:
                return point["photos"]
            share = (last[metric] - change) / max(last[metric] - point[metric], 1e-12)
            return last["photos"] + share * (point["photos"] - last["photos"])
        last = point
    return None


def fewer_photos(runs, metric):
    """How many times fewer photos `all` needs for the best change that the paper's estimator reaches, per seed.

    None where the paper's estimator never improves, or `all` never gets there.
    """
    found = []
    for paper, ours in zip(runs["paper"], runs["all"], strict=True):
        best = min(paper["curve"], key=lambda p: p[metric])
        need = photos_for(ours["curve"], metric, best[metric]) if best[metric] < 0 else None
        found.append(best["photos"] / need if need else None)
    return found


def summary(runs):
    """Mean change and interval of every row: dict row -> dict of "wild/..." and "synthetic/..." -> (mean, half)."""
    return {row: {f"{domain}/{k}": interval([r[domain][k]["change"] for r in many])
                  for domain in ("wild", "synthetic") for k in many[0][domain]} for row, many in runs.items()}


def ablation_table(runs, means):
    """Markdown of the summary: a row per setting, changes in percent."""
    shown = [f"wild/{k}" for k in SHOWN] + [f"synthetic/{k}" for k in SHOWN]
    lines = ["| row | photos | seconds | " + " | ".join(shown) + " |", "|---" * (3 + len(shown)) + "|"]
    for row, many in runs.items():
        cells = [f"{100 * means[row][k][0]:+.1f} +- {100 * means[row][k][1]:.1f}" for k in shown]
        lines.append(f"| {row} | {np.mean([r['photos'] for r in many]):.0f} | "
                     f"{np.mean([r['seconds'] for r in many]):.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(path, runs):
    """SVG: the mean change over seeds against photos seen and against seconds, one panel per metric."""
    panels = []
    for axis in ("photos", "seconds"):
        for metric in SHOWN:
            lines = []
            for row, many in runs.items():
                points = list(zip(*(r["curve"] for r in many), strict=False))
                lines.append(Line(row, [0.0] + [float(np.mean([p[axis] for p in at])) for at in points],
                                  [0.0] + [100 * float(np.mean([p[metric] for p in at])) for at in points]))
            panels.append((f"{metric}, change in %", axis + (" seen" if axis == "photos" else ""), lines))
    files.write_text(path, figure(panels, columns=len(SHOWN)))


def arguments(argv):
    """Parse the command line."""
    p = Parser(prog="bench.ablate", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--preset", choices=[k for k in PRESETS if k != "paper"], default="mini", help="settings [mini]")
    names = list(rows_of())
    p.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"of: {', '.join(names)}")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each has its own base and judge [0 1 2]")
    p.add_argument("--split", choices=("test", "val"), default="test",
                   help="scenes that are scored; choose settings on val [test]")
    p.add_argument("--steps", type=int, default=0, help="steps of `all`; they set the budget; 0: the preset's [0]")
    p.add_argument("--points", type=int, default=5, help="evaluations along each curve [5]")
    p.add_argument("--paper-lr", type=float, default=1e-4, help="learning rate of paper to +jitter [1e-4]")
    p.add_argument("--out", default="out/ablate", help="folder of everything [out/ablate]")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto]")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of a run [1]")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    p.add_argument("--set", nargs="*", default=[], metavar="FLAG=VALUE", help="train.py flags of every row")
    args = p.parse_args(argv)
    p.at_least(args, 1, "points", "threads", "jobs")
    try:
        args.flags = dict(read_setting(text) for text in args.set)
    except ValueError as error:
        p.error(f"--set {error}; want FLAG=VALUE with a flag of train.py and its value")
    args.rows = [r for r in names if r in args.rows]
    return args


def main(argv=None):
    """Command line: run what is missing, then the table, the plot and the raw numbers."""
    args = arguments(argv)
    jobs = []
    for seed in args.seeds:
        flops = prepare(args, seed)
        budget = (args.steps or row_config(args, "all", seed).steps) * flops["all"]
        jobs += [(args, row, seed, max(1, round(budget / flops[row]))) for row in args.rows]
    if args.jobs == 1:
        done = [run_row(job) for job in jobs]
    else:
        with get_context("spawn").Pool(args.jobs) as pool:
            done = pool.map(run_row, jobs, chunksize=1)
    runs = {row: [f for f in done if f["row"] == row] for row in args.rows}
    means = summary(runs)
    result = dict(about=about(), seeds=args.seeds, split=args.split, means=means, runs=runs)
    text = ablation_table(runs, means)
    print(f"\nchange in % on {args.split} scenes, mean over seeds {args.seeds} +- 95 % (Student's t); equal compute\n"
          + text)
    if {"paper", "all"} <= runs.keys():
        result["fewer_photos"] = {k: fewer_photos(runs, k) for k in SHOWN}
        for k, many in result["fewer_photos"].items():
            print(f"{k}: `all` needs "
                  + ", ".join("-" if x is None else f"{x:.1f}" for x in many) + " times fewer photos than `paper`")
    files.write_json(Path(args.out) / "ablation.json", result)
    files.write_text(Path(args.out) / "ablation.md", text + "\n")
    draw_curves(Path(args.out) / "ablation.svg", runs)
    print(f"written: {args.out}/ablation.json, ablation.md, ablation.svg")
    update_page(args.out, say=True)


if __name__ == "__main__":
    run_command(main, "bench.ablate")
