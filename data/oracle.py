"""A judge that knows the truth and errs as often as the paper's: what a better judge would be worth."""
import hashlib
import json

import torch

from data.questions import true_relations
from relations import MODALITIES

ORACLE = "oracle"                 # --judge
PAPER_ACCURACY = dict(depth=0.962, normal=0.935, albedo=0.894, irradiance=0.876)     # ReasonX, held-out judge accuracy
ACCURACY = 0.9                    # on a modality that the paper has not


class Oracle:
    """Answers from the true maps of scenes, wrong as often as PAPER_ACCURACY says.

    maps  true maps of all scenes: dict of (n, C, S, S), every modality and mask
    rng   torch.Generator of the errors; each `ask` goes on drawing from it
    """

    grid = 1

    def __init__(self, maps, rng):
        self.maps = maps
        self.rng = rng
        self.size = maps["mask"].shape[-1]

    def digest(self):
        """Hex digest of how it answers. The errors are not in it: they follow from the order of the questions."""
        return hashlib.sha256(json.dumps(["oracle", PAPER_ACCURACY]).encode()).hexdigest()

    def ask(self, rgb, pts, names=None, modalities=None):
        """As judge.Judge.ask; rgb is not looked at.

        pts      (B, P, 2, 2);  names  of the scenes, such as "wild 3": the number picks the maps
        returns  (B, P, M) probability of the first answer: the accuracy or one minus it; 0.5 in the dead zone,
                 NaN where not asked
        raises   ValueError without names
        """
        if names is None:
            raise ValueError("oracle.Oracle.ask: got no names; want the scene of every photo, such as 'wild 3'")
        index = torch.tensor([int(name.split()[-1]) for name in names])
        truth = true_relations({k: self.maps[k][index] for k in (*MODALITIES, "mask")}, pts).float()    # (B, P, M)
        right = torch.tensor([PAPER_ACCURACY.get(m, ACCURACY) for m in MODALITIES])
        sign = torch.where(torch.rand(truth.shape, generator=self.rng) < right, 1.0, -1.0)
        prob = 0.5 + (right - 0.5) * sign * truth
        asked = torch.tensor([modalities is None or m in modalities for m in MODALITIES])
        return prob.masked_fill(~asked, torch.nan)
