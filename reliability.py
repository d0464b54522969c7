"""How far a judge can be trusted: accuracy over every question, by margin and confidence, and colour bias.

accuracy     share of right answers over *all* questions; an undecided answer (p = 0.5 exactly, text that says nothing)
             is wrong. `released`: the judge release's own figure, which drops undecided answers from the denominator
confidence   c = max(p, 1 - p); expected calibration error = sum over ten bins of [0.5, 1] of n / N |accuracy - c|
swap         the same pair with red and green exchanged: a judge that says "red" both times is biased, not informed
"""
import numpy as np
import torch
from tqdm import tqdm

import questions
from relations import MODALITIES

BINS = 10                         # of the confidence in [0.5, 1]
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.4)   # lower edges, in units of relations.margin


def exchanged(row):
    """A row with red and green exchanged. raises ValueError for a picture whose markers are drawn already."""
    if "image" in row:
        raise ValueError(f"reliability.py: got {row['id']!r} with drawn markers, want points to exchange the colours; "
                         "evaluate on a scene folder")
    return row | dict(pts=row["pts"][::-1])


def ask(judge, rows, folder, batch=32):
    """Probability of answer one to every row's own question, one prefill each: (N,) float64 numpy."""
    prob, device = np.empty(len(rows)), judge.mean.device
    by = {m: [i for i, r in enumerate(rows) if r["modality"] == m] for m in MODALITIES}
    parts = [(m, places[i:i + batch]) for m, places in by.items() for i in range(0, len(places), batch)]
    for m, places in tqdm(parts, desc="judge", unit="batch", leave=False, disable=len(parts) < 8):
        images = questions.marked([rows[i] for i in places], folder, judge.size).to(device)
        prob[places] = judge.score(images, m).double().cpu().numpy()
    return prob


def both_orders(prob, swapped, albedo):
    """Mean of both orders in terms of the first one; albedo is symmetric in the colours. Arrays (N,)."""
    return (prob + np.where(albedo, swapped, 1 - swapped)) / 2


def calibration(prob, first):
    """Expected calibration error and its table: a dict low, n, confidence, accuracy per bin that holds answers."""
    confidence, right = np.maximum(prob, 1 - prob), correct(prob, first)
    place = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    table = [dict(low=0.5 + k / (2 * BINS), n=int((place == k).sum()), confidence=float(confidence[place == k].mean()),
                  accuracy=float(right[place == k].mean())) for k in range(BINS) if (place == k).any()]
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(prob), table


def correct(prob, first):
    """Whether each answer is right: (N,) bool; an undecided one is wrong."""
    return np.where(first, prob > 0.5, prob < 0.5)


def heuristic(rule, rows, folder, size):
    """Right answers of a one-line rule of scores.HEURISTICS: (N,) bool; a rule that is undecided says the second."""
    said = [float(rule(questions.photo(r, folder, size)[None], torch.tensor(r["pts"])[None, None])) > 0 for r in rows]
    return np.array(said) == np.array([r["first"] for r in rows])


def report(judge, rows, folder, rules, swap_average=False):
    """All figures per modality: dict of dicts, every number of the tables.

    rules         scores.HEURISTICS;  swap_average  True: answers are the mean of both orders
    raises        ValueError: no row; colours that cannot be exchanged
    """
    if not rows:
        raise ValueError("reliability.py: got no question; want scenes with ground truth")
    can_swap = not any("image" in r for r in rows)
    single = ask(judge, rows, folder)
    swapped = ask(judge, [exchanged(r) for r in rows], folder) if can_swap or swap_average else None
    albedo = np.array([r["modality"] == "albedo" for r in rows])
    prob = both_orders(single, swapped, albedo) if swap_average else single
    first, size = np.array([r["first"] for r in rows]), np.abs([r["margin"] for r in rows])
    out = {}
    for m in MODALITIES:
        on = np.array([r["modality"] == m for r in rows])
        if not on.any():
            continue
        right, decided = correct(prob[on], first[on]), prob[on] != 0.5
        ece, bins = calibration(prob[on], first[on])
        place = np.digitize(size[on], MARGINS) - 1                              # NaN: no margin known
        out[m] = row = dict(
            n=int(on.sum()), accuracy=float(right.mean()), undecided=int((~decided).sum()),
            released=float(right[decided].mean()) if decided.any() else float("nan"), ece=float(ece), bins=bins,
            first=float(first[on].mean()), says_first=float((prob[on] > 0.5).mean()),
            margins=[dict(low=low, n=int((place == k).sum()), accuracy=float(right[place == k].mean()))
                     for k, low in enumerate(MARGINS) if (place == k).any() and np.isfinite(size[on]).all()])
        if can_swap:
            row["heuristic"] = float(heuristic(rules[m][1], [r for r, k in zip(rows, on, strict=True) if k], folder,
                                               judge.size).mean())
            one, two = single[on] > 0.5, swapped[on] > 0.5
            row["inconsistent"] = float((one != two if m == "albedo" else one == two).mean())
            row["always_first"], row["always_second"] = float((one & two).mean()), float((~one & ~two).mean())
    return out
