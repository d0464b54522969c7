"""Evaluate predictors and judges: one table per data set, with its protocol and a paired interval.

    python eval.py --dataset wild                                       OUT/grpo against OUT/base, and the judge
    python eval.py --dataset scenes --data DIR --checkpoint X --compare BASE
    python eval.py --dataset judge --scenes DIR --judge MODEL           a judge against ground truth
Procedural sets use test scenes, which no stage trains or is tuned on. Numbers are unweighted means over images.
"""
import sys
from pathlib import Path

import numpy as np
import torch

import data
import metrics
import questions
import reliability
from config import Parser
from judge import load_judge, true_relations
from predictor import NAMES, load_predictor, sample_ode
from relations import at_points, margin, sample_pairs
from runtime import generator, pick_device, run_command, write_json
from scenes import srgb_decode

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


def score(pred, maps, pairs):
    """Every metric of METRICS per image: dict name -> (B,) numpy."""
    out = {name: [] for name in METRICS if not name.endswith("pairs")}
    linear = {(w, m): srgb_decode(v[m]).permute(0, 2, 3, 1).double().numpy()
              for w, v in (("pred", pred), ("true", maps)) for m in ("albedo", "irradiance")}
    mask, inverted = maps["mask"][:, 0].numpy(), 0
    for i, ok in enumerate(mask):
        true = maps["depth"][i, 0].masked_fill(~maps["mask"][i, 0], 1.0).double().numpy()
        guess = pred["depth"][i, 0].double().numpy()
        scale, shift = metrics.align_depth(guess, true, ok)
        inverted += scale < 0
        depth = metrics.depth_metrics((scale * guess + shift).clip(*DEPTH_RANGE), true, ok)
        out["depth/abs_rel"].append(depth["abs_rel"])
        out["depth/delta1"].append(depth["delta1"])
        angle = metrics.normal_error(pred["normal"][i].numpy(), maps["normal"][i].numpy())
        out["normal/angle"].append(np.nanmean(angle[ok]))
        pts, truth = (x[i] for x in pairs["albedo"])
        out["albedo/whdr10"].append(metrics.whdr_from_gt(linear["pred", "albedo"][i], linear["true", "albedo"][i],
                                                         pts[truth != 0].numpy(), 0.1))
        for m in ("albedo", "irradiance"):
            out[f"{m}/si_mse"].append(metrics.si_mse(linear["pred", m][i], linear["true", m][i], ok))
    if inverted:
        print(f"depth: {inverted} of {len(mask)} fitted scales are negative: "
              "there the prediction looks like inverse depth")
    out = {k: np.array(v, dtype=float) for k, v in out.items()}
    for m in NAMES:
        pts, truth = pairs[m]
        out[f"{m}/pairs"] = accuracy(margin(pred[m], pts, m), truth)
    return {name: out[name] for name in METRICS}


def judge_scores(judge, maps, pairs):
    """Accuracy of the judge and of the four heuristics per image: dict "judge/m", "heuristic/m" -> (B,) numpy."""
    out = {}
    for k, m in enumerate(NAMES):
        pts, truth = pairs[m]
        device = next(judge.parameters()).device
        prob = torch.cat([judge.ask(maps["rgb"][i:i + 32].to(device), pts[i:i + 32].to(device)).cpu()
                          for i in range(0, len(pts), 32)])
        out[f"judge/{m}"] = accuracy(prob[..., k] - 0.5, truth)
        out[f"heuristic/{m}"] = accuracy(HEURISTICS[m][1](maps["rgb"], pts), truth)
    return out


def compare(base, new):
    """Rows of the before/after table: dict metric -> base, x, relative change, 95 % interval of it, verdict."""
    rows = {}
    for name, (_, better) in METRICS.items():
        known = np.isfinite(base[name]) & np.isfinite(new[name])                 # images that have such pairs
        if not known.any() or base[name][known].mean() == 0:                    # nothing to be relative to
            change = low = high = float("nan")
        else:
            change, low, high = metrics.bootstrap_interval(base[name][known], new[name][known], relative=True)
        rows[name] = dict(base=float(np.nanmean(base[name])), x=float(np.nanmean(new[name])),
                          change=change, low=low, high=high,
                          verdict="better" if low * better > 0 and high * better > 0 else
                                  "worse" if low * better < 0 and high * better < 0 else "same")
    return rows


def evaluate(policy, maps, steps, seed, grid=1):
    """Metrics per image of one predictor on one set; see METRICS."""
    pairs = eval_pairs(maps, PAIRS, grid, seed)
    return score(predict(policy, maps["rgb"], steps, seed), maps, pairs)


def diagnose(policy, size, steps, n=24, seed=0):
    """Off-reward figures on validation scenes, for the log: sharpness and spread of wild maps, synthetic scores.

    A reward that rises while high-frequency energy or spread leaves the true maps' band is being hacked;
    synthetic scores that fall are forgetting.
    """
    out = {}
    maps = data.ScenePool("wild", "val", n, size).maps
    pred = predict(policy, maps["rgb"].float(), steps, seed)
    for m in NAMES:
        out[f"wild/{m}_high_frequency"] = float(np.mean([metrics.high_frequency_energy(x.numpy()) for x in pred[m]]))
        out[f"wild/{m}_spread"] = float(pred[m].std((2, 3)).mean())
    maps = data.ScenePool("synthetic", "val", n, size).all()
    values = evaluate(policy, maps, steps, seed)
    return out | {f"synthetic/{k}": float(np.nanmean(v)) for k, v in values.items()}


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
        shown = base_values or values
        lines = [(m, f"{result['judge'][f'judge/{m}']:.3f}", f"{np.nanmean(shown[f'{m}/pairs']):.3f}",
                  f"{result['judge'][f'heuristic/{m}']:.3f}", HEURISTICS[m][0]) for m in NAMES]
        table(f"{name}: accuracy on the same pairs; every pair counts",
              [(line[0], line[4], *line[1:4]) for line in lines],
              ("modality", "heuristic", "judge", "predictor" if base_values is None else "base", "heuristic"))
    return result


def arguments(argv):
    """Parse and check the command line; a user error exits with 2 before any model is loaded."""
    p = Parser(prog="eval.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--dataset", required=True, choices=(*PROCEDURAL, "scenes", "judge"),
                   help="synthetic, broad, wild: procedural test scenes; scenes: a folder with ID_rgb.png, "
                        "ID_depth.png, ID_normal.png, ID_albedo.png, ID_irradiance.png; judge: --judge against the "
                        "ground truth of --scenes")
    p.add_argument("--scenes", default="", help="scene folder, or .jsonl of the judge release, of --dataset judge")
    p.add_argument("--split", choices=("all", "train", "val"), default="all",
                   help="rooms of --scenes to ask about; val: those that training holds out [all]")
    p.add_argument("--pairs", type=int, default=8, help="of --dataset judge: questions per scene and modality [8]")
    p.add_argument("--swap-average", action="store_true",
                   help="of --dataset judge: ask with both orders of the colours, take the mean")
    p.add_argument("--text", action="store_true", help="of --dataset judge: a model that answers in text only (slow)")
    p.add_argument("--data", default="", help="folder of --dataset scenes")
    p.add_argument("--out", default="out/mini", help="run whose parts are used where no other is named [out/mini]")
    p.add_argument("--checkpoint", default="", help="predictor to evaluate [OUT/grpo]")
    p.add_argument("--compare", default="",
                   help="predictor to compare it with [OUT/base when --checkpoint is not given]")
    p.add_argument("--judge", default="", help="judge to score on the same pairs [OUT/judge if there]; none: no judge")
    p.add_argument("--images", type=int, default=128, help="test scenes of a procedural set [128]")
    p.add_argument("--size", type=int, default=0,
                   help="px, side of the square images [what the predictor was trained at]")
    p.add_argument("--denoise-steps", type=int, default=10, help="sampling steps [10]")
    p.add_argument("--seed", type=int, default=0, help="seed of noise and pairs [0]")
    p.add_argument("--json", default="", help="file for every printed number")
    args = p.parse_args(argv)
    for name in ("images", "denoise_steps", "pairs"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: want at least 1")
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
    if args.dataset == "judge":
        result = report_judge(args)
        return write_json(args.json, result) if args.json else None
    out = Path(args.out)
    policy = load_predictor(args.checkpoint or out / "grpo")
    compare_with = args.compare or ("" if args.checkpoint else out / "base")
    base = load_predictor(compare_with) if compare_with else None
    size = args.size or policy.cfg.size
    folder = Path(args.judge) if args.judge else out / "judge"
    judge = load_judge(folder) if args.judge not in ("", "none") or (not args.judge and folder.is_dir()) else None
    if args.dataset == "scenes":
        maps = data.scene_batch(args.data, size)
        maps["depth"] = maps["depth"] + 1                                       # affine in [0, 1]: no zero to divide by
    else:
        maps = data.ScenePool(args.dataset, "test", args.images, size).all()
    grid = judge.grid if judge is not None else 1
    values = evaluate(policy, maps, args.denoise_steps, args.seed, grid)
    base_values = evaluate(base, maps, args.denoise_steps, args.seed, grid) if base is not None else None
    judge_values = judge_scores(judge, maps, eval_pairs(maps, PAIRS, grid, args.seed)) if judge is not None else None
    result = report(args.dataset, values, base_values, judge_values)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run_command(main, "eval.py")
