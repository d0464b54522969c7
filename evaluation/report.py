"""The tables of scenes and judges, and what a training run reports at its end.

    python -m evaluation.report DIR                      DIR/report.html again (page.py): a run, an ablation, maps
    python -m evaluation.report FILE.json                FILE.html of what eval.py --json wrote

Numbers are unweighted means over images; a change has a paired bootstrap 95 % interval (intervals.py).
"""
import sys
from pathlib import Path

import numpy as np
import torch

from data import questions
from data.album import move_points
from data.oracle import ORACLE
from data.orders import BothOrders
from data.photos import fit_square
from data.pictures import panel, picture_of, save_png
from data.pools import ScenePool
from evaluation import reliability
from evaluation.agreement import confidence, photo_figures
from evaluation.intervals import bootstrap_interval, verdict
from evaluation.page import stride_for, update_page, write_page
from evaluation.scores import (
    HEURISTICS,
    METRICS,
    PAIRS,
    eval_pairs,
    judge_answers,
    judge_scores,
    predict_maps,
    score_maps,
)
from judge import load_judge
from predictor import load_predictor
from relations import MODALITIES, NAMES, draw_markers
from runtime.command import run_command
from runtime.files import write_json, write_tensors
from runtime.flags import Parser
from runtime.ranks import pick_device
from runtime.run import about

ROWS = 4                          # photos in a panel
VALUES = 150_000                  # numbers of its maps that stay beside it, 600 kB
MISTAKE = 96                      # px, longest side of a photo that shows a judge's mistake


def compared_paths(args):
    """Paths of what is evaluated and of what it is compared with ("": nothing), as the command line names them."""
    given = args.pred_dir or args.checkpoint
    new = given or (args.compare[1] if len(args.compare) == 2 else Path(args.out) / "grpo")
    old = args.compare[0] if args.compare else "" if given else Path(args.out) / "base"
    return new, old


def print_table(title, rows, header):
    """Print rows of strings under a header, columns aligned."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths, strict=True))))
    sys.stdout.flush()


def format_number(x):
    """Four decimals, two for large numbers."""
    return f"{x:.4f}" if abs(x) < 10 else f"{x:.2f}"


def format_interval(low, high):
    """Two ends in brackets; "-" when one is not finite."""
    return f"[{format_number(low)}, {format_number(high)}]" if np.isfinite([low, high]).all() else "-"


def compare_scores(base, new):
    """Rows of the before/after table: dict metric -> base, x, relative change, 95 % interval of it, verdict."""
    rows = {}
    for name in base:
        better = METRICS[name][1]
        known = np.isfinite(base[name]) & np.isfinite(new[name])                # images with a value
        if not known.any() or base[name][known].mean() == 0:                    # no relative change exists
            change = low = high = float("nan")
        else:
            change, low, high = bootstrap_interval(base[name][known], new[name][known], relative=True)
        rows[name] = dict(base=float(np.nanmean(base[name])), x=float(np.nanmean(new[name])),
                          change=change, low=low, high=high,
                          verdict=verdict(low, high, better))
    return rows


def report_scenes(name, values, base_values=None, judge_values=None):
    """Print the tables of one set of scenes; returns every printed number as a dict.

    values, base_values  of scores.score_maps, the evaluated predictor's and the one it is compared with
    judge_values         of scores.judge_scores
    """
    n = len(next(iter(values.values())))
    result = dict(dataset=name, n=n)
    title = f"{name}: {n} images evaluated of {n}; unweighted mean over images"
    if base_values is None:
        result["metrics"] = {k: float(np.nanmean(v)) for k, v in values.items()}
        lines = [(k, METRICS[k][0], format_number(v)) for k, v in result["metrics"].items()]
        print_table(title, lines, ("metric", "protocol", "value"))
    else:
        result["metrics"] = compare_scores(base_values, values)
        lines = [(k, METRICS[k][0], format_number(r["base"]), format_number(r["x"]), f"{100 * r['change']:+.1f} %",
                  f"[{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]", r["verdict"])
                 for k, r in result["metrics"].items()]
        print_table(title + "; change with paired bootstrap 95 % interval", lines,
                    ("metric", "protocol", "base", "X", "change", "95 %", ""))
    if judge_values is not None:
        result["judge"] = known = {k: float(np.nanmean(v)) for k, v in judge_values.items()}
        lines = [(m, HEURISTICS[m][0], *(f"{known[f'{who}/{m}']:.3f}" if f"{who}/{m}" in known else "-"
                                         for who in ("judge", "predictor", "heuristic"))) for m in NAMES]
        print_table(f"{name}: accuracy on pairs that the judge can be asked; every pair counts", lines,
                    ("modality", "heuristic", "judge", "predictor" if base_values is None else "base", "heuristic"))
    return result


def report_judge(args):
    """Print the tables of --dataset judge; returns every printed number as a dict.

    args  of the command line: judge, out, scenes, split, pairs, seed, text, swap_average
    """
    judge = load_judge(args.judge or Path(args.out) / "judge", pick_device("auto", "eval.py"), text=args.text)
    if args.scenes.endswith(".jsonl"):
        rows = questions.read_jsonl(args.scenes)
    else:
        rows = questions.build_questions(args.scenes, args.pairs, judge.size, args.seed,
                                         None if args.split == "all" else args.split, judge.grid)
    result = reliability.judge_figures(judge, rows, args.scenes, HEURISTICS, args.swap_average)
    n = len(rows)
    rooms = len({r["scene"].split(".")[0] for r in rows})
    figures = ("accuracy", "heuristic", "ece", "inconsistent", "always_first", "always_second")
    lines = [(m, HEURISTICS[m][0], str(r["n"]), str(r["unknown"]), *(f"{r.get(k, np.nan):.3f}" for k in figures),
              str(r["undecided"]), f"{r['released']:.3f}") for m, r in result.items()]
    orders = ", both orders averaged" if args.swap_average else ""
    print_table(f"judge: {n} questions of {n} about {rooms} rooms of {args.scenes} ({args.split}), {judge.size} px, "
                f"balanced answers{orders}; every question that it knows counts", lines,
                ("modality", "heuristic", "n", "unknown", "judge", "heuristic", "ECE", "inconsistent", "first twice",
                 "second twice", "undecided", "decided only"))
    lines = [(m, "  ".join(f"{b['low']:.2f}: {b['accuracy']:.3f} of {b['n']}" for b in r["margins"]))
             for m, r in result.items()]
    print_table("accuracy by margin (relations.margin, lower edge: accuracy of n)", lines, ("modality", "margin"))
    lines = [(m, "  ".join(f"{b['low']:.2f}: {b['accuracy']:.3f} at {b['confidence']:.3f}, {b['n']}"
                           for b in r["bins"])) for m, r in result.items()]
    print_table("reliability (confidence bin, lower edge: accuracy at mean confidence, n)", lines,
                ("modality", "confidence"))
    report_orders({m: r["orders"] for m, r in result.items() if "orders" in r})
    return dict(dataset="judge", n=n, rooms=rooms, swap_average=args.swap_average, judge=result)


def report_orders(figures):
    """Print what both orders of the colours are worth: dict modality -> reliability.order_figures."""
    if not figures:
        return
    lines = [(m, f"{r['bias']:+.3f}, {r['bias_size']:.3f}",
              *(text for k in ("accuracy", "brier") for text in (
                  f"{r[k]['one']:.4f}", f"{r[k]['both']:.4f}", f"{r[k]['change']:+.4f}",
                  f"[{r[k]['low']:+.4f}, {r[k]['high']:+.4f}]")),
              f"{r['ece']['one']:.4f}", f"{r['ece']['both']:.4f}") for m, r in figures.items()]
    print_table("one order of the colours against the mean of both; bias: mean p - q, mean |p - q|; change with paired "
                "bootstrap 95 % over scenes", lines,
                ("modality", "bias", "accuracy", "both", "change", "95 %", "Brier", "both", "change", "95 %", "ECE",
                 "both"))


def report_wild(cfg, device, start, result):
    """Before/after table on held-out scenes, the judge beside it, a picture; writes OUT/report.json, OUT/panel.png.

    cfg            of the run: out, judge, both_orders, size, eval_images, eval_steps, micro, seed
    start, result  SPEC of the predictor that GRPO started from, and of what it has become
    """
    out = Path(cfg.out)
    before, after = (load_predictor(spec).to(device) for spec in (start, result))
    oracle = cfg.judge == ORACLE
    judge_model = None if oracle else load_judge(cfg.judge or out / "judge", device)
    judge_model = BothOrders(judge_model) if cfg.both_orders else judge_model
    results = []
    for name in ("wild", "synthetic", "broad"):
        maps = ScenePool(name, "test", cfg.eval_images, cfg.size).all()
        pairs = eval_pairs(maps, PAIRS, 1, 0)
        pred = [predict_maps(p, maps["rgb"], cfg.eval_steps, 0, cfg.micro or 64) for p in (before, after)]
        values = [score_maps(p, maps, pairs) for p in pred]
        scores = None
        more = {}
        if judge_model is not None and name != "synthetic":
            seen = maps if judge_model.size == cfg.size else ScenePool(name, "test", cfg.eval_images,
                                                                       judge_model.size).all()
            answers = judge_answers(judge_model, seen, 0, name)
            scores = judge_scores(answers, seen, pred[0])
            more = dict(reliability=reliability.answer_figures(answers, seen))
            if name == "wild":
                more["mistakes"] = save_mistakes(out / "mistakes.safetensors", seen, answers)
        results.append(report_scenes(name, values[1], values[0], scores) | more)
        if name == "wild":
            shown = save_panel(out / "panel.png", maps["rgb"], *pred, truth=maps)
    write_json(out / "report.json", dict(about=about(), seed=cfg.seed, shown=shown, tables=results))
    print(f"\nwritten: {out}/report.json, {out}/panel.png; "
          f"maps of your own photos: python predictor.py PHOTO --checkpoint {result}")
    update_page(out, say=True)


def report_photos(cfg, device, held, start, result):
    """Before/after figures without ground truth on photos of --images that were held out; writes two files.

    cfg            of the run: images, eval_images, eval_steps, micro, seed, and the settings of the reward
    held           data.bank.Judgements, the photos on which nothing was trained; of them the first cfg.eval_images
    start, result  SPEC of the predictor that GRPO started from, and of what it has become

    OUT/photos/report.json holds n, the names of the photos, the judge's mean confidence in each modality, and for each
    figure base, x (after), change with its paired bootstrap 95 % interval (low, high), verdict, n. The figures:
    reward/m and agreement/m of evaluation/agreement.py, and depth-normal RMSE where the predictor has both maps.
    OUT/photos/panel.png shows the first photos with the maps before and after
    """
    n = min(cfg.eval_images, len(held.rgb))
    shown = []
    values = []
    for spec in (start, result):                                                # one in memory at a time
        policy = load_predictor(spec).to(device)
        shown.append(predict_maps(policy, held.rgb[:ROWS].float() / 255, cfg.eval_steps, 0, cfg.micro or ROWS))
        values.append(photo_figures(policy, held, cfg, n))
        del policy
    figures = {"n": n, "photos": held.names[:n], "judge/confidence": {}}
    lines = []
    for name, before in values[0].items():
        kind, _, m = name.partition("/")
        if kind in ("high_frequency", "spread"):                                # neither is better or worse
            continue
        known = np.isfinite(before)
        a, b = before[known], values[1][name][known]
        change, low, high = bootstrap_interval(a, b)
        is_better = verdict(low, high, 1 if m else -1)
        figures[name] = dict(base=float(a.mean()), x=float(b.mean()), change=change, low=low, high=high,
                             verdict=is_better, n=len(a))
        if m:
            figures["judge/confidence"][m] = confidence(held, m, n)
        sure = f"confidence {figures['judge/confidence'][m]:.3f}" if m else "ours"
        lines.append((name, sure, str(len(a)), f"{a.mean():.4f}", f"{b.mean():.4f}", f"{change:+.4f}",
                      f"[{low:+.4f}, {high:+.4f}]", is_better))
    print_table(f"{cfg.images}: {n} of {len(held.rgb)} held-out photos, on which nothing was trained; no ground truth "
                "exists; change with paired bootstrap 95 % interval",
                lines, ("figure", "judge", "photos", "base", "X", "change", "95 %", ""))
    folder = cfg.grpo_folder
    figures["shown"] = save_panel(folder / "panel.png", held.rgb[:ROWS].float() / 255, *shown, labels=held.names)
    write_json(folder / "report.json", dict(about=about(), seed=cfg.seed, **figures))
    update_page(folder, say=True)


def save_panel(path, rgb, before, after, truth=None, labels=None, rows=ROWS):
    """Write a picture: a row per photo (n, 3, H, W) with the maps before and after, and the true maps if known.

    Their values lie beside it in a .safetensors of at most VALUES numbers: "ROW/MODALITY/WORD" (C, h, w).
    returns  dict for report.json: names of the photos; stride: of so many rows and columns one is there
    """
    tiles = []
    values = {}
    for i in range(min(rows, len(rgb))):
        tiles.append((labels[i] if labels else "photo", rgb[i].numpy()))
        values[f"{i}/photo/photo"] = rgb[i]
        for m in before:
            for word, maps in (("base", before), ("X", after), ("truth", truth)):
                if maps is not None:
                    value = maps[m][i]
                    if word == "truth" and MODALITIES[m].kind == "distance":    # show sky at the largest depth
                        value = value.masked_fill(~truth["mask"][i], value[truth["mask"][i]].max())
                    tiles.append((f"{m} {word}", picture_of(m, value.numpy())))
                    values[f"{i}/{m}/{word}"] = value
    save_png(path, panel(tiles, columns=len(tiles) // min(rows, len(rgb))))
    k = stride_for(sum(x.numel() for x in values.values()), VALUES)
    write_tensors(path.with_suffix(".safetensors"), {name: x[..., ::k, ::k].float() for name, x in values.items()})
    return dict(names=(labels or [f"photo {i}" for i in range(len(rgb))])[:rows], stride=k)


def save_mistakes(path, maps, answers):
    """Write photos with the markers of a judge's most confident wrong answers, uint8 (3, h, w) by "MODALITY NUMBER".

    maps, answers  of scenes, and of scores.judge_answers about them
    returns        dict of the same names -> photo, pts (of the judge's size), prob of the first answer, said, truth
    """
    pictures = {}
    found = {}
    for m, worst in reliability.worst_answers(answers).items():
        pts, truth, prob = answers[m]
        for k, (i, j) in enumerate(worst):
            size = maps["rgb"].shape[-1]
            side = min(size, MISTAKE)
            places = move_points(pts[i, j], size, side)[None, None]
            marked = draw_markers(fit_square(maps["rgb"][i], side)[None], places)
            first, second = MODALITIES[m].words
            pictures[f"{m} {k}"] = (255 * marked[0, 0]).round().to(torch.uint8)
            found[f"{m} {k}"] = dict(photo=i, pts=pts[i, j].tolist(), prob=float(prob[i, j]),
                                     said=first if prob[i, j] > 0.5 else second,
                                     truth=first if truth[i, j] > 0 else second)
    write_tensors(path, pictures)
    return found


def main(argv=None):
    """Command line: the page of what lies in a folder."""
    p = Parser(prog="evaluation.report", allow_abbrev=False, description="Write DIR/report.html, a page to look at.")
    p.add_argument("place", metavar="DIR",
                   help="folder of a run, of bench.ablate or of maps; or FILE.json of eval.py --json")
    p.limits()
    print(f"written: {write_page(p.parse_args(argv).place)}")


if __name__ == "__main__":
    run_command(main, "evaluation.report")
