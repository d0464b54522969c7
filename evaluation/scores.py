"""Scores on procedural scenes and on folders of scenes: errors of maps, accuracy of maps and judges on pairs.

Every score is an array with one number per image, so that two predictors can be compared image by image.
"""
import numpy as np
import torch

from data.album import move_points
from data.maps import assumed_camera
from data.questions import true_relations
from evaluation import metrics, surface
from predictor import sample_ode
from relations import MODALITIES, at_points, margin, sample_pairs, srgb_decode
from runtime.ranks import gather_rows, generator, share_rows

PAIRS = 24                        # per image and modality
DEPTH_RANGE = (0.1, 100.0)        # metres, to which aligned predictions are clipped
SURFACE = ("depth", "normal")       # two maps of one surface, which must fit each other
ERRORS = {  # kind of map: metric: (text, sign of the good direction)
    "distance": {"abs_rel": ("AbsRel, least-squares scale and shift in depth", -1),
                 "delta1": ("delta1, same alignment", 1)},
    "vector": {"angle": ("mean angle, degrees", -1)},
    "colour": {"si_mse": ("scale-invariant MSE, linear", -1)},
    "scalar": {"abs_err": ("mean absolute error", -1)},
}
HEURISTICS = {  # modality: (text, score: > 0 means the first answer). A useful judge is more accurate than these rules
    "depth": ("lower pixel is closer", lambda rgb, pts: (pts[..., 0, 0] - pts[..., 1, 0]).float()),
    "normal": ("upper pixel faces the camera more", lambda rgb, pts: (pts[..., 1, 0] - pts[..., 0, 0]).float()),
    "albedo": ("close chromaticity is the same colour", lambda rgb, pts: 0.03 - chroma_distance(rgb, pts)),
    "irradiance": ("brighter pixel is more lit", lambda rgb, pts: margin(rgb, pts, "irradiance")),
}
ALWAYS = ("always the first answer", lambda rgb, pts: torch.ones(pts.shape[:-2]))
HEURISTICS |= {m: ALWAYS for m in MODALITIES if m not in HEURISTICS}


def metrics_of(row):
    """Metrics of a modality, a relations.Modality: dict name -> (text, sign of the good direction)."""
    same = {"whdr10": ("WHDR 10 %, linear, labels from ground truth (ours)", -1)} if row.yes_no else {}
    return same | ERRORS[row.kind] | {"pairs": ("pair accuracy, balanced" if row.yes_no else "pair accuracy", 1)}


METRICS = {f"{m}/{name}": how for m, row in MODALITIES.items() for name, how in metrics_of(row).items()}


def chroma_distance(rgb, pts):
    """Distance of r / (r + g + b) and g / (r + g + b) between the points: (B, 3, H, W), (B, P, 2, 2) -> (B, P)."""
    value = at_points(rgb, pts)                                                 # (B, P, 2, 3)
    chroma = (value / value.sum(-1, keepdim=True).clamp_min(1e-3))[..., :2]
    return (chroma[..., 0, :] - chroma[..., 1, :]).norm(dim=-1)


def eval_pairs(maps, n, grid, seed):
    """Pairs whose true relation is known, per modality, yes/no balanced; the same for predictors and judges.

    returns  dict modality -> pts (B, n, 2, 2), truth (B, n) int8 with 0 where an image has too few such pairs
    """
    B, _, H, W = maps["rgb"].shape
    pts = sample_pairs(B, (H, W), 8 * n, generator(seed, 17), mask=maps["mask"], grid=grid)
    truth = true_relations(maps, pts)                                           # (B, 8n, M)
    chosen = {}
    for k, (m, row) in enumerate(MODALITIES.items()):
        rel = truth[..., k]
        if row.yes_no:                                                          # n/2 of each answer, in draw order
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
def predict_maps(policy, rgb, steps, seed, batch=64, together=False):
    """All maps of photos (B, 3, H, W): dict modality -> (B, C, H, W) on the CPU. The noise depends on `seed` alone.

    together  True when all ranks call: each computes its share
    """
    noise = torch.randn(len(rgb), *policy.shape(rgb), generator=generator(seed, 23))
    device = next(policy.parameters()).device
    out = {m: [] for m in policy.modalities}
    own = share_rows(len(rgb)) if together else list(range(len(rgb)))
    for i in range(0, len(own), batch):
        rows = own[i:i + batch]
        part = rgb[rows].to(device)
        cond = policy.encode(part)
        for walk in policy.walks:
            maps = sample_ode(policy, part, walk, steps, noise=noise[rows].to(device), cond=cond)
            for m, one in zip(walk, maps, strict=True):
                out[m].append(one.float().cpu())
    maps = {m: torch.cat(v) for m, v in out.items()}
    return {m: gather_rows(x, len(rgb)) for m, x in maps.items()} if together else maps


def map_errors(row, guess, true, ok, pts, truth):
    """Errors of one map but for pairs: dict name -> value; whether it looks like inverse depth; whether truth is flat.

    A truth of one value is met by any fitted scale: those errors are NaN then.

    row          relations.Modality;  guess, true  (C, H, W), colours linear;  ok (H, W) bool numpy
    pts, truth   of `eval_pairs` for this image
    """
    if row.kind == "distance":
        true = true[0].masked_fill(~torch.from_numpy(ok), 1.0).double().numpy()
        guess = guess[0].double().numpy()
        scale, shift = metrics.align_depth(guess, true, ok)
        found = metrics.depth_metrics((scale * guess + shift).clip(*DEPTH_RANGE), true, ok)
        flat = metrics.is_constant(true[ok])
        return {name: np.nan if flat else found[name] for name in ERRORS[row.kind]}, scale < 0, flat
    if row.kind == "vector":
        return {"angle": np.nanmean(metrics.normal_error(guess.numpy(), true.numpy())[ok])}, False, False
    if row.kind == "scalar":
        return {"abs_err": (guess - true)[0].double().abs().numpy()[ok].mean()}, False, False
    guess, true = (x.permute(1, 2, 0).double().numpy() for x in (guess, true))
    flat = metrics.is_constant(true[ok])
    errors = {"si_mse": np.nan if flat else metrics.si_mse(guess, true, ok)}
    if row.yes_no:
        errors["whdr10"] = metrics.whdr_from_gt(guess, true, pts[truth != 0].numpy(), 0.1)
    return errors, False, flat


def score_maps(pred, maps, pairs, warn=True):
    """Every metric of METRICS whose modality was predicted, per image.

    pred     dict modality -> (B, C, H, W) in the encodings of relations.MODALITIES
    maps     true maps of a scene pool: the modalities, depth in metres, mask (B, 1, H, W);  pairs  of `eval_pairs`
    warn     print a line where a fitted depth scale is negative, and where a true map is one value
    returns  dict name -> (B,) float64 numpy; NaN where the true map is one value, which a fitted scale always meets
    """
    out = {name: [] for name in METRICS if name.split("/")[0] in pred and not name.endswith("pairs")}
    masks = maps["mask"][:, 0].numpy()
    inverted = 0                                                                # fitted depth scales below 0
    flat = dict.fromkeys(pred, 0)                                               # true maps of one value
    for m in pred:
        row = MODALITIES[m]
        guesses, truths = (srgb_decode(v[m]) if row.kind == "colour" else v[m] for v in (pred, maps))
        for i, ok in enumerate(masks):
            errors, is_inverted, is_flat = map_errors(row, guesses[i], truths[i], ok, *(x[i] for x in pairs[m]))
            inverted += is_inverted
            flat[m] += is_flat
            for name, value in errors.items():
                out[f"{m}/{name}"].append(value)
    if inverted and warn:
        print(f"depth: {inverted} of {len(masks)} fitted scales are negative: "
              "there the prediction looks like inverse depth")
    for m, n in flat.items():
        if n and warn:
            print(f"{m}: {n} of {len(masks)} true maps are one value everywhere: they get no error with a fitted scale")
    out = {k: np.array(v, dtype=float) for k, v in out.items()}
    for m in pred:
        pts, truth = pairs[m]
        out[f"{m}/pairs"] = accuracy(margin(pred[m], pts, m), truth)
    return {name: out[name] for name in METRICS if name in out}


def device_of(judge):
    """Where a judge wants its photos: the device of its weights, the CPU where it has none."""
    weights = judge.parameters() if isinstance(judge, torch.nn.Module) else ()
    return next((p.device for p in weights), torch.device("cpu"))


def judge_answers(judge, maps, seed, domain=""):
    """What a judge says of `eval_pairs` at points that it can read, and what is true.

    maps     of a scene pool, of the judge's size;  domain  of the scenes, whose names are "DOMAIN NUMBER"
    returns  dict modality -> pts (B, P, 2, 2), truth (B, P) int8, prob (B, P) of the first answer, on the CPU. truth is
             0 and counts nowhere where there is no pair, and where prob is NaN: the judge does not know it
    """
    out = {}
    pairs = eval_pairs(maps, PAIRS, judge.grid, seed)
    names = [f"{domain} {i}" for i in range(len(maps["rgb"]))]
    device = device_of(judge)
    for k, m in enumerate(MODALITIES):
        pts, truth = pairs[m]
        prob = torch.cat([judge.ask(maps["rgb"][i:i + 32].to(device), pts[i:i + 32].to(device), names[i:i + 32]).cpu()
                          for i in range(0, len(pts), 32)])[..., k]
        out[m] = (pts, truth.where(prob.isfinite(), 0), prob)
    return out


def judge_scores(answers, maps, pred):
    """Accuracy of a judge, of a predictor's maps and of the heuristics on the pairs of `judge_answers`.

    maps     that the judge was asked about;  pred  dict modality -> (B, C, H, W) of the same scenes, of any size
    returns  dict "judge/m", "predictor/m", "heuristic/m" -> (B,) numpy
    """
    out = {}
    for m, (pts, truth, prob) in answers.items():
        out[f"judge/{m}"] = accuracy(prob - 0.5, truth)
        if m in pred:
            places = move_points(pts, maps["rgb"].shape[-1], pred[m].shape[-1])
            out[f"predictor/{m}"] = accuracy(margin(pred[m], places, m), truth)
        out[f"heuristic/{m}"] = accuracy(HEURISTICS[m][1](maps["rgb"], pts), truth)
    return out


def photo_scores(pred):
    """Depth-normal consistency per photo, which needs no truth: maps (B, C, H, W) -> (B,) RMSE of unit normals.

    The paper names no camera: ours is maps.assumed_camera.
    """
    figures = []
    for depth, normal in zip(*(pred[m] for m in SURFACE), strict=True):
        z, *camera = assumed_camera(depth[0].double().numpy())
        figures.append(surface.depth_normal_consistency(z, normal.double().numpy(), *camera))
    return np.array(figures)
