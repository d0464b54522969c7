"""How reliable a judge is: accuracy over every question, by margin and confidence, calibration, and colour bias.

accuracy     share of right answers over *all* questions; an undecided answer (p = 0.5 exactly, text that is no answer)
             is wrong; one that is not known (NaN) counts as `unknown` and in no other figure. `released` is the judge
             release's figure, which leaves undecided answers out of the denominator
confidence   c = max(p, 1 - p); expected calibration error = sum over ten bins of [0.5, 1] of n / N |accuracy - c|
swap         the same pair with red and green swapped: a judge that says "red" both times answers by colour alone
both orders  the mean of p and q of data/orders.py, against p alone: accuracy, Brier score and calibration error
"""
import numpy as np
import torch
from tqdm import tqdm

from data import questions
from evaluation.intervals import bootstrap_interval
from evaluation.scores import device_of
from relations import MODALITIES, NAMES, margin

BINS = 10                         # of the confidence in [0.5, 1]
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.4)   # lower edges, in units of relations.margin


def swap_colours(row):
    """A row with red and green swapped. raises ValueError for a picture in which the markers are drawn already."""
    if "image" in row:
        raise ValueError(f"reliability.py: got {row['id']!r} with drawn markers, want points to exchange the colours; "
                         "evaluate on a scene folder")
    return row | dict(pts=row["pts"][::-1])


def score_rows(judge, rows, folder, batch=32):
    """Probability of the first answer to every row's own question: (N,) float64 numpy; NaN: not known.

    A vision-language model is scored on the marked pictures, another judge is asked about the points.
    raises   ValueError: pictures with drawn markers, for a judge that is asked about points
    """
    prob = np.empty(len(rows))
    by = {m: [i for i, r in enumerate(rows) if r["modality"] == m] for m in MODALITIES}
    parts = [(m, places[i:i + batch]) for m, places in by.items() for i in range(0, len(places), batch)]
    for m, places in tqdm(parts, desc="judge", unit="batch", leave=False, disable=len(parts) < 8):
        chosen = [rows[i] for i in places]
        if hasattr(judge, "score"):
            images = questions.marked_photos(chosen, folder, judge.size).to(device_of(judge))
            prob[places] = judge.score(images, m).double().cpu().numpy()
        else:
            prob[places] = ask_rows(judge, chosen, folder, m)
    return prob


def ask_rows(judge, rows, folder, modality):
    """As score_rows, of rows of one modality, for a judge that has `ask` alone: (N,) tensor."""
    drawn = [r["id"] for r in rows if "image" in r]
    if drawn:
        raise ValueError(f"reliability.py: got {drawn[0]!r} with drawn markers, want points for a judge that is asked "
                         "about them; evaluate it on a scene folder")
    rgb = torch.stack([questions.read_photo(r, folder, judge.size) for r in rows]).to(device_of(judge))
    pts = torch.tensor([r["pts"] for r in rows], device=rgb.device)[:, None]    # (N, 1, 2, 2)
    prob = judge.ask(rgb, pts, [str(questions.photo_path(r, folder)) for r in rows], (modality,))
    return prob[:, 0, NAMES.index(modality)].cpu()


def average_orders(prob, swapped, symmetric):
    """Mean answer of both orders of the colours, as a probability for the first order. Arrays (N,).

    symmetric  True where the right answer is the same in both orders (a yes/no question)
    """
    return (prob + np.where(symmetric, swapped, 1 - swapped)) / 2


def calibration(prob, first):
    """Expected calibration error and its table: a dict low, n, confidence, accuracy per bin that has answers."""
    confidence = np.maximum(prob, 1 - prob)
    right = right_answers(prob, first)
    place = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    table = [dict(low=0.5 + k / (2 * BINS), n=int((place == k).sum()), confidence=float(confidence[place == k].mean()),
                  accuracy=float(right[place == k].mean())) for k in range(BINS) if (place == k).any()]
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(prob), table


def right_answers(prob, first):
    """Which answers are right: (N,) bool; an undecided one is wrong."""
    return np.where(first, prob > 0.5, prob < 0.5)


def right_guesses(rule, rows, folder, size):
    """Right answers of a rule of scores.HEURISTICS: (N,) bool; an undecided rule gives the second answer."""
    said = []
    for row in rows:
        rgb = questions.read_photo(row, folder, size)
        said.append(float(rule(rgb[None], torch.tensor(row["pts"])[None, None])) > 0)
    return np.array(said) == np.array([r["first"] for r in rows])


def judge_figures(judge, rows, folder, rules, swap_average=False):
    """All figures per modality: dict of dicts, every number of the tables.

    rules         scores.HEURISTICS;  swap_average  True: answers are the mean of both orders
    raises        ValueError: no row; colours that cannot be swapped
    """
    if not rows:
        raise ValueError("reliability.py: got no question; want scenes with ground truth")
    can_swap = not any("image" in r for r in rows)
    single = score_rows(judge, rows, folder)
    swapped = score_rows(judge, [swap_colours(r) for r in rows], folder) if can_swap or swap_average else None
    symmetric = np.array([MODALITIES[r["modality"]].yes_no for r in rows])
    prob = average_orders(single, swapped, symmetric) if swap_average else single
    known = np.isfinite(prob if swapped is None else prob + swapped)
    first = np.array([r["first"] for r in rows])
    size = np.abs([r["margin"] for r in rows])
    scenes = np.array([r["scene"] for r in rows])
    out = {}
    for m, row in MODALITIES.items():
        own = np.array([r["modality"] == m for r in rows])
        on = own & known
        if not on.any():
            continue
        out[m] = accuracy_figures(prob[on], first[on], size[on]) | dict(unknown=int(own.sum() - on.sum()))
        if can_swap:
            right = right_guesses(rules[m][1], [r for r, k in zip(rows, on, strict=True) if k], folder, judge.size)
            out[m]["heuristic"] = float(right.mean())
            out[m] |= swap_figures(single[on], swapped[on], row.yes_no)
            out[m]["orders"] = order_figures(single[on], swapped[on], row.yes_no, first[on], scenes[on])
    return out


def answer_figures(answers, maps):
    """Figures of a judge's answers about scenes with true maps: dict modality -> accuracy_figures.

    answers  of scores.judge_answers about the same scenes
    """
    out = {}
    for m, (pts, truth, prob) in answers.items():
        on = truth != 0
        if on.any():
            size = margin(maps[m].masked_fill(~maps["mask"], torch.nan), pts, m).abs()
            out[m] = accuracy_figures(*(x.double().numpy() for x in (prob[on], truth[on] > 0, size[on])))
    return out


def worst_answers(answers, n=2):
    """The n most confident wrong answers, of different photos: dict modality -> list of (photo, pair), surest first."""
    out = {}
    for m, (_, truth, prob) in answers.items():
        is_wrong = (truth != 0) & ((prob > 0.5) != (truth > 0)) & (prob != 0.5)
        sure = (prob - 0.5).abs().where(is_wrong, 0).max(1)                     # one a photo
        order = sure.values.argsort(descending=True, stable=True)[:n]
        out[m] = [(i, int(sure.indices[i])) for i in order.tolist() if sure.values[i] > 0]
    return out


def accuracy_figures(prob, first, margin):
    """Figures of one modality's answers: arrays (N,) of probability, truth and size of the margin (NaN: not known)."""
    right = right_answers(prob, first)
    decided = prob != 0.5
    ece, bins = calibration(prob, first)
    place = np.digitize(margin, MARGINS) - 1
    by_margin = [dict(low=low, n=int((place == k).sum()), accuracy=float(right[place == k].mean()))
                 for k, low in enumerate(MARGINS) if (place == k).any() and np.isfinite(margin).all()]
    return dict(n=len(prob), accuracy=float(right.mean()), undecided=int((~decided).sum()),
                released=float(right[decided].mean()) if decided.any() else float("nan"), ece=float(ece), bins=bins,
                first=float(first.mean()), says_first=float((prob > 0.5).mean()), margins=by_margin)


def swap_figures(prob, swapped, symmetric):
    """How often the answers to both orders of the colours contradict each other, or are the same word.

    prob, swapped  (N,) probability of the first answer
    symmetric      True: the right answer is the same in both orders
    """
    one = prob > 0.5
    two = swapped > 0.5
    return dict(inconsistent=float((one != two if symmetric else one == two).mean()),
                always_first=float((one & two).mean()), always_second=float((~one & ~two).mean()))


def order_figures(prob, swapped, symmetric, first, scenes):
    """What the mean over both orders of the colours is worth against one order.

    prob, swapped, symmetric  as swap_figures;  first (N,) bool, the truth;  scenes (N,) their names
    returns  dict: bias, bias_size: mean of p - q and of |p - q|
                   accuracy, brier: one, both, change, low, high: paired bootstrap 95 % interval over scenes
                   ece: one, both
    """
    mean = average_orders(prob, swapped, symmetric)
    gap = 2 * (prob - mean)
    _, scene, counts = np.unique(scenes, return_inverse=True, return_counts=True)
    out = dict(bias=float(gap.mean()), bias_size=float(np.abs(gap).mean()))
    for name, figure in (("accuracy", right_answers), ("brier", lambda p, truth: (p - truth) ** 2)):
        one, both = (figure(p, first) for p in (prob, mean))
        change, low, high = bootstrap_interval(*(np.bincount(scene, x) / counts for x in (one, both)), weights=counts)
        out[name] = dict(one=float(one.mean()), both=float(both.mean()), change=change, low=low, high=high)
    return out | dict(ece=dict(one=float(calibration(prob, first)[0]), both=float(calibration(mean, first)[0])))
