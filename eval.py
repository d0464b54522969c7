"""Evaluate predictors and judges: one table per data set, with its protocol and a paired interval.

    python eval.py --dataset wild                                       OUT/grpo against OUT/base, and the judge
    python eval.py --dataset scenes --data DIR --checkpoint X --compare BASE
    python eval.py --dataset judge --scenes DIR --judge MODEL           a judge against ground truth
    python eval.py --dataset eth3d --data DIR --checkpoint X            a public benchmark (--list-datasets)
    python eval.py --dataset nyuv2 --data DIR --pred-dir MAPS           another method's saved maps
Procedural sets use test scenes, which no stage trains or is tuned on. Numbers are unweighted means over images.
Results of every benchmark image are appended to OUT/eval/*.jsonl: the same command again goes on where it was killed.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import benchmarks
import metrics
import predictions
import protocols
import questions
import reliability
from config import Parser
from files import write_json
from judge import load_judge
from pictures import panel, save_png
from pools import ScenePool, scene_batch, scene_pool
from predictor import NAMES, load_predictor, sample_ode
from questions import true_relations
from relations import at_points, margin, sample_pairs, srgb_decode
from runtime import generator, pick_device, run_command

PROCEDURAL = ("synthetic", "broad", "wild")
PAIRS = 24                        # per image and modality
DEPTH_RANGE = (0.1, 100.0)        # metres, clips aligned predictions
METRICS = {  # name: (modality, text, better)
    "depth/abs_rel": ("AbsRel, least-squares scale and shift", -1),
    "depth/delta1": ("delta1, same alignment", 1),
    "depth/pairs": ("pair accuracy", 1),
    "normal/angle": ("mean angle, degrees", -1),
    "normal/pairs": ("pair accuracy", 1),
    "albedo/whdr10": ("WHDR 10 %, linear, labels from ground truth (ours)", -1),
    "albedo/si_mse": ("scale-invariant MSE, linear", -1),
    "albedo/pairs": ("pair accuracy, balanced", 1),
    "irradiance/si_mse": ("scale-invariant MSE, linear", -1),
    "irradiance/pairs": ("pair accuracy", 1),
}
HEURISTICS = {  # one line each; a judge that loses to them is a poor reward
    "depth": ("lower pixel is closer", lambda rgb, pts: (pts[..., 0, 0] - pts[..., 1, 0]).float()),
    "normal": ("upper pixel faces the camera more", lambda rgb, pts: (pts[..., 1, 0] - pts[..., 0, 0]).float()),
    "albedo": ("close chromaticity is the same colour", lambda rgb, pts: 0.03 - chroma_distance(rgb, pts)),
    "irradiance": ("brighter pixel is more lit", lambda rgb, pts: margin(rgb, pts, "irradiance")),
}


def chroma_distance(rgb, pts):
    """Distance of r / (r + g + b) and g / (r + g + b) between the points: (B, 3, H, W), (B, P, 2, 2) -> (B, P)."""
    value = at_points(rgb, pts)                                                 # (B, P, 2, 3)
    chroma = (value / value.sum(-1, keepdim=True).clamp_min(1e-3))[..., :2]
    return (chroma[..., 0, :] - chroma[..., 1, :]).norm(dim=-1)


def eval_pairs(maps, n, grid, seed):
    """Pairs whose true relation is known, per modality, balanced for albedo; the same for predictors and judges.

    returns  dict modality -> pts (B, n, 2, 2), truth (B, n) int8 with 0 where an image has too few such pairs
    """
    B, _, H, W = maps["rgb"].shape
    pts = sample_pairs(B, (H, W), 8 * n, generator(seed, 17), mask=maps["mask"], grid=grid)
    truth = true_relations(maps, pts)                                           # (B, 8n, M)
    chosen = {}
    for k, m in enumerate(NAMES):
        rel = truth[..., k]
        if m == "albedo":                                                       # n/2 of each answer, in draw order
            place = torch.where(rel > 0, (rel > 0).cumsum(1), (rel < 0).cumsum(1))
            keep = (rel != 0) & (place <= n // 2)
        else:
            keep = (rel != 0) & ((rel != 0).cumsum(1) <= n)
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :n]
        chosen[m] = (pts.gather(1, order[..., None, None].expand(-1, -1, 2, 2)), (rel * keep).gather(1, order))
    return chosen


def accuracy(score, truth):
    """Share of right signs per image over pairs with a truth: (B, P) x2 -> (B,) numpy, NaN where there is none."""
    ok = ((score > 0) == (truth > 0)) & (truth != 0)
    return (ok.sum(1).double() / (truth != 0).sum(1)).numpy()


@torch.no_grad()
def predict(policy, rgb, steps, seed, batch=64):
    """All maps of a batch of photos from the same noise for every policy: dict modality -> (B, C, H, W) on the CPU."""
    noise = torch.randn(len(rgb), *policy.shape(rgb), generator=generator(seed, 23))
    device = next(policy.parameters()).device
    out = {m: [] for m in policy.modalities}
    for i in range(0, len(rgb), batch):
        part = rgb[i:i + batch].to(device)
        cond = policy.encode(part)
        for m in policy.modalities:
            out[m].append(sample_ode(policy, part, m, steps, noise=noise[i:i + batch].to(device), cond=cond).cpu())
    return {m: torch.cat(v) for m, v in out.items()}


def score(pred, maps, pairs, warn=True):
    """Every metric of METRICS whose modality was predicted, per image: dict name -> (B,) numpy.

    warn  say so where a fitted depth scale is negative
    """
    out = {name: [] for name in METRICS if name.split("/")[0] in pred and not name.endswith("pairs")}
    linear = {(w, m): srgb_decode(v[m]).permute(0, 2, 3, 1).double().numpy()
              for w, v in (("pred", pred), ("true", maps)) for m in ("albedo", "irradiance") if m in pred}
    mask, inverted = maps["mask"][:, 0].numpy(), 0
    for i, ok in enumerate(mask):
        if "depth" in pred:
            true = maps["depth"][i, 0].masked_fill(~maps["mask"][i, 0], 1.0).double().numpy()
            guess = pred["depth"][i, 0].double().numpy()
            scale, shift = metrics.align_depth(guess, true, ok)
            inverted += scale < 0
            depth = metrics.depth_metrics((scale * guess + shift).clip(*DEPTH_RANGE), true, ok)
            out["depth/abs_rel"].append(depth["abs_rel"])
            out["depth/delta1"].append(depth["delta1"])
        if "normal" in pred:
            angle = metrics.normal_error(pred["normal"][i].numpy(), maps["normal"][i].numpy())
            out["normal/angle"].append(np.nanmean(angle[ok]))
        if "albedo" in pred:
            pts, truth = (x[i] for x in pairs["albedo"])
            out["albedo/whdr10"].append(metrics.whdr_from_gt(
                linear["pred", "albedo"][i], linear["true", "albedo"][i], pts[truth != 0].numpy(), 0.1))
        for m in {"albedo", "irradiance"} & pred.keys():
            out[f"{m}/si_mse"].append(metrics.si_mse(linear["pred", m][i], linear["true", m][i], ok))
    if inverted and warn:
        print(f"depth: {inverted} of {len(mask)} fitted scales are negative: "
              "there the prediction looks like inverse depth")
    out = {k: np.array(v, dtype=float) for k, v in out.items()}
    for m in pred:
        pts, truth = pairs[m]
        out[f"{m}/pairs"] = accuracy(margin(pred[m], pts, m), truth)
    return {name: out[name] for name in METRICS if name in out}


def judge_scores(judge, maps, pred, seed):
    """Accuracy of the judge, of a predictor's maps and of the four heuristics on pairs that the judge can be asked.

    pred     dict modality -> (B, C, H, W);  returns  dict "judge/m", "predictor/m", "heuristic/m" -> (B,) numpy
    """
    out, pairs = {}, eval_pairs(maps, PAIRS, judge.grid, seed)
    for k, m in enumerate(NAMES):
        pts, truth = pairs[m]
        device = next(judge.parameters()).device
        prob = torch.cat([judge.ask(maps["rgb"][i:i + 32].to(device), pts[i:i + 32].to(device)).cpu()
                          for i in range(0, len(pts), 32)])
        out[f"judge/{m}"] = accuracy(prob[..., k] - 0.5, truth)
        if m in pred:
            out[f"predictor/{m}"] = accuracy(margin(pred[m], pts, m), truth)
        out[f"heuristic/{m}"] = accuracy(HEURISTICS[m][1](maps["rgb"], pts), truth)
    return out


def verdict(low, high, better):
    """What a change's interval says: better, worse, or same when it holds 0. better: sign of the good direction."""
    return ("better" if low * better > 0 and high * better > 0 else
            "worse" if low * better < 0 and high * better < 0 else "same")


def compare(base, new):
    """Rows of the before/after table: dict metric -> base, x, relative change, 95 % interval of it, verdict."""
    rows = {}
    for name in base:
        better = METRICS[name][1]
        known = np.isfinite(base[name]) & np.isfinite(new[name])                 # images that have such pairs
        if not known.any() or base[name][known].mean() == 0:                    # nothing to be relative to
            change = low = high = float("nan")
        else:
            change, low, high = metrics.bootstrap_interval(base[name][known], new[name][known], relative=True)
        rows[name] = dict(base=float(np.nanmean(base[name])), x=float(np.nanmean(new[name])),
                          change=change, low=low, high=high,
                          verdict=verdict(low, high, better))
    return rows


def diagnose(policy, size, steps, n=24, seed=0, batch=64):
    """Figures on n validation scenes a domain, for the log: scores, and the sharpness and spread of wild maps.

    No stage learns from them. A reward that rises while high-frequency energy or spread leaves the true maps' band is
    being hacked; synthetic scores that fall are forgetting.
    """
    out = {}
    for domain in ("wild", "synthetic"):
        maps = scene_pool(domain, "val", n, size).all()
        pred = predict(policy, maps["rgb"], steps, seed, batch)
        values = score(pred, maps, eval_pairs(maps, PAIRS, 1, seed), warn=False)
        out |= {f"{domain}/{k}": float(np.nanmean(v)) for k, v in values.items()}
        if domain == "wild":
            for m in policy.modalities:
                energy = [metrics.high_frequency_energy(x.numpy()) for x in pred[m]]
                out |= {f"wild/{m}_high_frequency": float(np.mean(energy)),
                        f"wild/{m}_spread": float(pred[m].std((2, 3)).mean())}
    return out


def drift(now, start, band, forget):
    """What has left its band since the start, as words; "" while nothing has.

    now, start  figures of `diagnose`
    band        factor by which sharpness and spread of wild maps may change, either way; 0: any
    forget      share by which a synthetic validation error may grow; 0: any
    """
    for name in now:
        if start.get(name) is None or now[name] is None:                        # not finite, or not measured then
            continue
        if band and name.startswith("wild/") and name.endswith(("_high_frequency", "_spread")):
            factor = now[name] / max(start.get(name) or 0, 1e-12)
            if not 1 / band <= factor <= band:
                return f"{name} is {factor:.2g} x what it was (--band {band:g})"
        domain, _, metric = name.partition("/")
        if forget and domain == "synthetic" and METRICS[metric][1] < 0 and now[name] > (1 + forget) * start[name]:
            return f"{name} has grown from {start[name]:.4g} to {now[name]:.4g} (--forget {forget:g})"
    return ""


def photo_scores(pred):
    """Depth-normal consistency per photo, a figure that needs no truth: maps (B, C, H, W) -> (B,) RMSE of unit normals.

    Ours where the paper is silent: focal length = the longer side, z = 1 + 2 d for predicted relative depth d.
    """
    focal = max(pred["depth"].shape[-2:])
    return np.array([metrics.depth_normal_consistency(1 + 2 * d[0].double().numpy(), n.double().numpy(), focal, focal)
                     for d, n in zip(pred["depth"], pred["normal"], strict=True)])


def table(title, rows, header):
    """Print rows of strings under a header, columns aligned."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths, strict=True))))
    sys.stdout.flush()


def number(x):
    """Four decimals, two for large numbers."""
    return f"{x:.4f}" if abs(x) < 10 else f"{x:.2f}"


def interval(low, high):
    """Two ends in brackets; "-" where there is none."""
    return f"[{number(low)}, {number(high)}]" if np.isfinite([low, high]).all() else "-"


def report(name, values, base_values=None, judge_values=None):
    """Print the tables of one data set; returns every printed number as a dict."""
    n = len(next(iter(values.values())))
    result = dict(dataset=name, n=n)
    title = f"{name}: {n} images evaluated of {n}; unweighted mean over images"
    if base_values is None:
        result["metrics"] = {k: float(np.nanmean(v)) for k, v in values.items()}
        table(title, [(k, METRICS[k][0], number(v)) for k, v in result["metrics"].items()],
              ("metric", "protocol", "value"))
    else:
        result["metrics"] = rows = compare(base_values, values)
        table(title + "; change with paired bootstrap 95 % interval",
              [(k, METRICS[k][0], number(r["base"]), number(r["x"]), f"{100 * r['change']:+.1f} %",
                f"[{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]", r["verdict"]) for k, r in rows.items()],
              ("metric", "protocol", "base", "X", "change", "95 %", ""))
    if judge_values is not None:
        result["judge"] = {k: float(np.nanmean(v)) for k, v in judge_values.items()}
        known = result["judge"]
        lines = [(m, HEURISTICS[m][0], *(f"{known[f'{who}/{m}']:.3f}" if f"{who}/{m}" in known else "-"
                                         for who in ("judge", "predictor", "heuristic"))) for m in NAMES]
        table(f"{name}: accuracy on pairs that the judge can be asked; every pair counts",
              lines,
              ("modality", "heuristic", "judge", "predictor" if base_values is None else "base", "heuristic"))
    return result


# public benchmarks --------------------------------------------------------------------------------------------------

def check_problems(bench, source, rows, items):
    """Lines that must be printed with the numbers; saved maps of the wrong kind throughout are refused."""
    lines = protocols.problems(bench, rows, [item["name"] for item in items])
    if source.saved and sum(r.get("scale", 1) < 0 for r in rows) > len(rows) / 2:
        raise ValueError(f"{source.label}: {lines[0]}; want depth, larger is farther; save 1 / disparity")
    if source.saved and bench.task == "normal" and lines:
        raise ValueError(f"{source.label}: {lines[0]}")
    return lines


def benchmark_report(bench, source, rows, base, base_rows, lines, n_expected):
    """Print one benchmark's table; returns every printed number."""
    values = protocols.lists(bench, rows)
    if not values:
        raise ValueError(f"{bench.dataset}: got no judgement that counts in any of {len(rows)} images, want one; "
                         "evaluate more images")
    olds = protocols.lists(bench, base_rows) if base_rows else {}
    paper = protocols.PAPER.get((bench.dataset, bench.task), {})
    n, partial = len(rows), bool(n_expected) and len(rows) != n_expected
    print(f"\n{bench.dataset}, {bench.task}: {n} images evaluated of {n_expected or n} expected"
          + (f"   *** PARTIAL: {n} of {n_expected}, not the benchmark's number ***" if partial else ""))
    print(f"  protocol: {bench.protocol}\n  predictions: {source.label}")
    if base:
        print(f"  base: {base.label}; change relative, paired bootstrap 95 % interval")
    result, table_rows = {}, []
    for name, v in values.items():
        text, better, times = protocols.METRICS[bench.task][name]
        known, w = ~np.isnan(v), protocols.weights(name, rows)                  # an infinite PSNR counts
        row = dict(n=int(known.sum()))
        value, low, high = times * float(np.average(v[known], weights=w[known])), *2 * (float("nan"),)
        if known.sum() > 1 and np.isfinite(value):                              # one image says nothing of the spread
            low, high = (times * x for x in metrics.bootstrap_interval(v[known], weights=w[known])[1:])
        row |= dict(value=value, low=low, high=high)
        cells = [number(value), interval(low, high)]
        if base:
            old = olds.get(name, np.full(len(v), np.nan))
            both = known & ~np.isnan(old)
            change = low = high = float("nan")
            if both.any() and old[both].any() and np.isfinite([*old[both], *v[both]]).all():
                change, low, high = metrics.bootstrap_interval(old[both], v[both], relative=True, weights=w[both])
                low, high = (low, high) if both.sum() > 1 else 2 * (float("nan"),)
            before = float(times * np.average(old[both], weights=w[both])) if both.any() else float("nan")
            row |= dict(base=before, change=change, change_low=low, change_high=high,
                        verdict=verdict(low, high, better))
            cells = [number(before), cells[0], f"{100 * change:+.1f} %", interval(100 * low, 100 * high),
                     row["verdict"]]
        row["paper"] = [dict(base=who, value=a, x=b) for who, a, b in paper.get(name, [])]
        cells.append("; ".join(f"{who} {a:g} -> {b:g}" for who, a, b in paper.get(name, [])) or "-")
        result[name] = {k: "inf" if isinstance(x, float) and x == np.inf else x for k, x in row.items()}
        table_rows.append((name, text if row["n"] in (0, n) else f"{text} ({row['n']} images)", *cells))
    head = ("base", "X", "change", "95 %", "") if base else ("value", "95 %")
    table(f"{bench.dataset}, {bench.task}", table_rows, ("metric", "", *head, "the paper's base -> X"))
    for line in lines:
        print(f"  !! {line}")
    if partial:
        print(f"  !! PARTIAL: {n} of {n_expected} images; do not compare with published numbers")
    return dict(dataset=bench.dataset, task=bench.task, n=n, expected=n_expected, partial=partial,
                protocol=bench.protocol, predictions=source.label, base=base.label if base else None, warnings=lines,
                metrics=result)


def benchmark_panels(bench, source, files, items, rows, n, path):
    """Picture of the best, the worst, the second best ... image by the first metric, read and predicted again."""
    name, (_, better, _) = next(iter(protocols.METRICS[bench.task].items()))
    known = [i for i, r in enumerate(rows) if r.get(name) is not None]
    order = sorted(known, key=lambda i: -better * rows[i][name])
    picked = [i for pair in zip(order, order[::-1], strict=True) for i in pair]
    tiles, columns = [], 0
    for rank, i in enumerate(list(dict.fromkeys(picked))[:n]):
        sample = source.read(bench, files, items[i])
        pred = source.predict(bench, sample)
        sample["photos"] = benchmarks.load(bench, files, items[i])["photos"]    # at full size
        shown = protocols.pictures(bench, pred, sample)
        title = f"{'best' if rank % 2 == 0 else 'worst'}: {name} {number(rows[i][name])}, {items[i]['name']}"
        tiles += [(title, shown[0][1]), *shown[1:]]
        columns = len(shown)
    if tiles:
        print(f"  pictures: {save_png(path, panel(tiles, columns))}")


def evaluate_benchmarks(args):
    """The tables of a public benchmark; everything that can be missing is looked for before a network is opened."""
    opened = []
    for bench in benchmarks.chosen(args.dataset, args.task):
        files, items, missing = benchmarks.find(bench, args.data)
        if missing and not args.limit:
            there = sum(benchmarks.complete(files, item) for item in items)
            raise benchmarks.MissingData(f"--data {args.data}: got {there} of {len(items)} images of {bench.dataset} "
                                         f"(first missing: {missing[0]}), want all; --limit N takes what is there",
                                         benchmarks.page(bench, missing))
        there = [item for item in items if benchmarks.complete(files, item)][:args.limit or None]
        passed = items[:items.index(there[-1])] if len(there) == args.limit else items
        skipped = [item["name"] for item in passed if not benchmarks.complete(files, item)]
        skipped = [f"{len(skipped)} incomplete images were skipped (first: {skipped[0]})"] if skipped else []
        opened.append((bench, files, there, bench.count or len(items), skipped))
    new = args.pred_dir or args.checkpoint or (args.compare[1] if len(args.compare) == 2 else Path(args.out) / "grpo")
    old = args.compare[0] if args.compare else "" if args.checkpoint or args.pred_dir else Path(args.out) / "base"
    sources = [(predictions.folder if args.pred_dir else predictions.source_of)(new, args)]
    sources += [predictions.source_of(old, args)] if old else []
    results, refused = [], ""
    for bench, files, items, n_expected, lines in opened:
        reason = next((why for why in (s.lacks(bench, items) for s in sources) if why), "")
        if reason:
            refused = refused or reason
            print(f"{bench.dataset}, {bench.task}: left out: {reason}")
            continue
        rows = []
        for s in sources:
            path = predictions.results_file(bench, s, files, items, args.out)
            rows.append(predictions.evaluate_images(bench, s, files, items, path))
            lines += [f"{s.label}: {line}" if old else line for line in check_problems(bench, s, rows[-1], items)]
        results.append(benchmark_report(bench, sources[0], rows[0], sources[1] if old else None,
                                        rows[1] if old else None, lines, n_expected))
        if args.panels:
            path = Path(args.out, "eval", f"{bench.dataset}-{bench.task}.png")
            benchmark_panels(bench, sources[0], files, items, rows[0], args.panels, path)
    if not results:
        raise ValueError(refused)
    return results[0] if len(results) == 1 else dict(dataset=args.dataset, tables=results)


def check_data(args):
    """Count and decode a benchmark's files. raises ValueError at the first bad one, MissingData for absent ones."""
    result = []
    for bench in benchmarks.chosen(args.dataset, args.task):
        files, items, missing = benchmarks.find(bench, args.data)
        there = [item for item in items if benchmarks.complete(files, item)][:args.limit or None]
        size = sum(max(0, files.size(f)) for item in there for role, f in item.items() if role != "name")
        print(f"{bench.dataset}, {bench.task}: {len(there)} of {bench.count or len(items)} images complete in "
              f"{files.path}, {size / 1e9:.3f} GB", flush=True)
        for item in tqdm(there, desc="decode", disable=len(there) < 3):
            benchmarks.load(bench, files, item, axes=True)
        print(f"  {len(there)} images decoded, none is bad")
        if missing and not args.limit:
            raise benchmarks.MissingData(f"--data {args.data}: {len(missing)} files of {bench.dataset} are missing "
                                         f"(first: {missing[0]})", benchmarks.page(bench, missing))
        result.append(dict(dataset=bench.dataset, task=bench.task, n=len(there), expected=bench.count or len(items),
                           bytes=size))
    return result[0] if len(result) == 1 else dict(dataset=args.dataset, tables=result)


def list_datasets():
    """Print every data set with its task, count, licence and source."""
    print("dataset         task      images  needs                source; licence")
    for b in benchmarks.BENCHMARKS:
        source, licence, _ = benchmarks.ABOUT[b.dataset, b.task]
        print(f"{b.dataset:15} {b.task:9} {b.count or '-':>6}  {', '.join(b.needs):20} {source}; {licence}")
    print(f"{'scenes':15} {'all four':9} {'-':>6}  {'all four':20} your folder of ID_rgb.png, ID_depth.png, ...")
    for name in PROCEDURAL:
        print(f"{name:15} {'all four':9} {'-':>6}  {'all four':20} rendered by scenes.py")


def arguments(argv):
    """Parse and check the command line; a user error exits with 2 before any model is loaded."""
    p = Parser(prog="eval.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--dataset", default="", metavar="NAME",
                   choices=(*PROCEDURAL, "scenes", "judge", *benchmarks.DATASETS),
                   help="synthetic, broad, wild: procedural test scenes; scenes: a folder with ID_rgb.png, "
                        "ID_depth.png, ID_normal.png, ID_albedo.png, ID_irradiance.png; judge: --judge against the "
                        "ground truth of --scenes; photos: depth-normal "
                        f"consistency on any folder; benchmarks: {', '.join(benchmarks.DATASETS[:-1])}")
    p.add_argument("--scenes", default="", help="scene folder, or .jsonl of the judge release, of --dataset judge")
    p.add_argument("--split", choices=("all", "train", "val"), default="all",
                   help="rooms of --scenes to ask about; val: those that training holds out [all]")
    p.add_argument("--pairs", type=int, default=8, help="of --dataset judge: questions per scene and modality [8]")
    p.add_argument("--swap-average", action="store_true",
                   help="of --dataset judge: ask with both orders of the colours, take the mean")
    p.add_argument("--text", action="store_true", help="of --dataset judge: a model that answers in text only (slow)")
    p.add_argument("--task", default="",
                   help="of a benchmark that has both: depth, normal [depth]")
    p.add_argument("--data", default="", help="folder of scenes or photos; folder or uncompressed tar of a benchmark")
    p.add_argument("--list-datasets", action="store_true",
                   help="print every data set, its source and licence, and stop")
    p.add_argument("--check-data", action="store_true",
                   help="count and decode the files of a benchmark, name the first bad one, and stop")
    p.add_argument("--limit", type=int, default=0,
                   help="at most this many of the images that are there; the number is partial [0: all]")
    p.add_argument("--out", default="out/mini", help="run whose parts are used where no other is named [out/mini]")
    p.add_argument("--checkpoint", default="", help="predictor to evaluate [OUT/grpo]")
    p.add_argument("--compare", default=[], nargs="+", metavar=("BASE", "NEW"),
                   help="predictor (or folder of saved maps) to compare with, or two of them: the base and the new one "
                        "[OUT/base when neither --checkpoint nor --pred-dir is given]")
    p.add_argument("--pred-dir", default="",
                   help="score saved maps in Marigold's naming, e.g. test/kitchen_0004/pred_0001.npy")
    p.add_argument("--pred-space", default="", choices=("", "linear", "srgb"),
                   help="colour space of saved albedo and shading [srgb; hypersim: linear]")
    p.add_argument("--judge", default="", help="judge to score on the same pairs [OUT/judge if there]; none: no judge")
    p.add_argument("--images", type=int, default=128, help="test scenes of a procedural set [128]")
    p.add_argument("--size", type=int, default=0,
                   help="px, side of the square images [what the predictor was trained at]")
    p.add_argument("--processing-res", type=int, default=None,
                   help="px, long edge the network sees of a benchmark photo, 0: the photo's own [what it was "
                        "trained at, else the protocol's]")
    p.add_argument("--ensemble-size", type=int, default=1, help="noise draws averaged per benchmark photo [1]")
    p.add_argument("--denoise-steps", type=int, default=None,
                   help="sampling steps [scenes: 10; benchmarks: the model's own, 10 for ours]")
    p.add_argument("--seed", type=int, default=0, help="seed of noise and pairs [0]")
    p.add_argument("--panels", type=int, default=0,
                   help="benchmark images to picture, best and worst first, in OUT/eval/DATASET-TASK.png [0]")
    p.add_argument("--json", default="", help="file for every printed number; an infinite PSNR is the string \"inf\"")
    p.limits()
    args = p.parse_args(argv)
    if args.list_datasets:
        return args
    if not args.dataset:
        p.error("the following arguments are required: --dataset")
    p.at_least(args, 1, "images", "denoise_steps", "ensemble_size", "pairs")
    p.at_least(args, 0, "limit", "panels", "processing_res")
    if len(args.compare) > 2 or (len(args.compare) == 2 and (args.checkpoint or args.pred_dir)):
        p.error("--compare: want BASE beside --checkpoint or --pred-dir, or the two of them alone")
    if args.checkpoint and args.pred_dir:
        p.error("--checkpoint and --pred-dir: want one of them")
    public = args.dataset in benchmarks.DATASETS
    for name in ("task", "limit", "pred_dir", "pred_space", "panels", "check_data"):
        if getattr(args, name) and not public:
            p.error(f"--{name.replace('_', '-')} belongs to a benchmark, not to --dataset {args.dataset}")
    if args.dataset == "judge" and not args.scenes:
        p.error("--dataset judge needs --scenes DIR, a folder with ground truth (README, Data)")
    if args.dataset == "scenes" and not args.data:
        p.error("--dataset scenes needs --data FOLDER with ID_rgb.png, ID_depth.png, ID_normal.png, ID_albedo.png, "
                "ID_irradiance.png (README, Data)")
    return args


def report_judge(args):
    """Print the tables of --dataset judge; returns every printed number as a dict."""
    device = pick_device("auto", "eval.py")
    judge = load_judge(args.judge or Path(args.out) / "judge", device, text=args.text)
    if args.scenes.endswith(".jsonl"):
        rows = questions.read_jsonl(args.scenes)
    else:
        rows = questions.build(args.scenes, args.pairs, judge.size, args.seed,
                               None if args.split == "all" else args.split, judge.grid)
    result = reliability.report(judge, rows, args.scenes, HEURISTICS, args.swap_average)
    n, rooms = len(rows), len({r["scene"].split(".")[0] for r in rows})
    table(f"judge: {n} questions of {n} about {rooms} rooms of {args.scenes} ({args.split}), {judge.size} px, balanced "
          f"answers{', both orders averaged' if args.swap_average else ''}; every question counts",
          [(m, HEURISTICS[m][0], str(r["n"]), f"{r['accuracy']:.3f}", f"{r.get('heuristic', np.nan):.3f}",
            f"{r['ece']:.3f}", f"{r.get('inconsistent', np.nan):.3f}", f"{r.get('always_first', np.nan):.3f}",
            f"{r.get('always_second', np.nan):.3f}", str(r["undecided"]), f"{r['released']:.3f}")
           for m, r in result.items()],
          ("modality", "heuristic", "n", "judge", "heuristic", "ECE", "inconsistent", "first twice", "second twice",
           "undecided", "decided only"))
    table("accuracy by margin (relations.margin, lower edge: accuracy of n)",
          [(m, "  ".join(f"{b['low']:.2f}: {b['accuracy']:.3f} of {b['n']}" for b in r["margins"]))
           for m, r in result.items()], ("modality", "margin"))
    table("reliability (confidence bin, lower edge: accuracy at mean confidence, n)",
          [(m, "  ".join(f"{b['low']:.2f}: {b['accuracy']:.3f} at {b['confidence']:.3f}, {b['n']}" for b in r["bins"]))
           for m, r in result.items()], ("modality", "confidence"))
    return dict(dataset="judge", n=n, rooms=rooms, swap_average=args.swap_average, judge=result)


def main(argv=None):
    """Command line: the tables of one data set."""
    args = arguments(argv)
    if args.list_datasets:
        return list_datasets()
    if args.dataset in benchmarks.DATASETS:
        try:
            result = check_data(args) if args.check_data else evaluate_benchmarks(args)
        except benchmarks.MissingData as error:
            print(f"eval.py: {error}\n{error.page}", file=sys.stderr)
            raise SystemExit(2) from None
    else:
        result = report_judge(args) if args.dataset == "judge" else evaluate_procedural(args)
    if args.json:
        write_json(args.json, result)


def evaluate_procedural(args):
    """The tables of procedural scenes or of a scene folder, with the judge on the same pairs."""
    out, device = Path(args.out), pick_device("auto", "eval.py")
    policy = load_predictor(args.checkpoint or (args.compare[1] if len(args.compare) == 2 else out / "grpo")).to(device)
    compare_with = args.compare[0] if args.compare else ("" if args.checkpoint else out / "base")
    base = load_predictor(compare_with).to(device) if compare_with else None
    for p in (policy, base):
        lacking = [m for m in NAMES if p is not None and m not in p.modalities]
        if lacking:
            raise ValueError(f"--dataset {args.dataset} scores all of {', '.join(NAMES)}: got a predictor of "
                             f"{', '.join(p.modalities)}; want one that has {', '.join(lacking)}, or a benchmark of "
                             "what it predicts (--list-datasets)")
    size = args.size or policy.size
    place = Path(args.judge) if args.judge else out / "judge"
    asked = args.judge not in ("", "none") or (not args.judge and place.is_dir())
    judge = load_judge(place, device) if asked else None
    if args.dataset == "scenes":
        maps = scene_batch(args.data, size)
        maps["depth"] = maps["depth"] + 1                                       # affine in [0, 1]: no zero to divide by
    else:
        maps = ScenePool(args.dataset, "test", args.images, size).all()
    pairs, steps = eval_pairs(maps, PAIRS, 1, args.seed), args.denoise_steps or 10
    pred = [predict(p, maps["rgb"], steps, args.seed) for p in (policy, base) if p is not None]
    values = [score(p, maps, pairs) for p in pred]
    judge_values = judge_scores(judge, maps, pred[-1], args.seed) if judge is not None else None
    return report(args.dataset, values[0], values[1] if base is not None else None, judge_values)


if __name__ == "__main__":
    run_command(main, "eval.py")
