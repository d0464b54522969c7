"""Figures of maps of photos without ground truth, from the judge's answers: a number per photo, for table and watch.

reward      the share of agreement that training maximises, in the settings of the run (table in grpo.py)
agreement   hard: the share of pairs of which map and judge say the same; a map in its dead zone counts one half
A photo of which the judge knows nothing in a modality has no number (NaN) there. A map is read at the judged points.
"""
from dataclasses import replace

import numpy as np
import torch

from evaluation import metrics
from evaluation.scores import SURFACE, photo_scores, predict_maps
from grpo import agreement
from relations import NAMES

CHUNK = 16                        # photos whose maps are in memory at a time


def photo_figures(policy, judged, cfg, n):
    """Figures of a policy's maps of the first n photos: dict name -> (n,) float64 numpy.

    judged   data.bank.Judgements;  cfg  eval_steps, micro and the settings of the reward of runtime.config.Config
    returns  "reward/m", "agreement/m" of each modality that the judge knows, "high_frequency/m", "spread/m" of each,
             "depth-normal RMSE" where both are predicted
    """
    found = []
    hard = replace(cfg, reward="hard", dead_zone="half", balance=False)
    for i in range(0, min(n, len(judged.rgb)), CHUNK):
        part = slice(i, min(n, i + CHUNK))
        pred = predict_maps(policy, judged.rgb[part].float() / 255, cfg.eval_steps, i, cfg.micro or CHUNK)
        values = {}
        for m, maps in pred.items():
            prob = judged.prob[part, :, NAMES.index(m)]
            unknown = ~prob.isfinite().any(1)
            for name, how in (("reward", cfg), ("agreement", hard)):
                share = agreement(maps[:, None], judged.pts[part], prob, m, how)[2][:, 0]
                values[f"{name}/{m}"] = share.double().masked_fill(unknown, torch.nan).numpy()
            values[f"high_frequency/{m}"] = np.array([metrics.high_frequency_energy(x.numpy()) for x in maps])
            values[f"spread/{m}"] = maps.std((2, 3)).double().mean(1).numpy()
        if all(m in pred for m in SURFACE):
            values["depth-normal RMSE"] = photo_scores(pred)
        found.append(values)
    figures = {name: np.concatenate([values[name] for values in found]) for name in found[0]}
    return {name: x for name, x in figures.items() if np.isfinite(x).any()}


def confidence(judged, modality, n):
    """Mean |2 p - 1| of the judge's answers about the first n photos; p: its probability of the first answer."""
    prob = judged.prob[:n, :, NAMES.index(modality)]
    return float((2 * prob[prob.isfinite()] - 1).abs().mean())
