"""The judgement bank: what the judge has answered, on disk, so that no question is ever asked twice.

The judge sees the photo and the points, never the prediction: an answer serves all G samples, every epoch, rank and
run, with the judge itself not in memory. One safetensors file per photo holds pts (P, 2, 2), in pixels of the judge's
image, and prob (P, M), the probability of the first answer per modality. The folder is named by the judge's digest
(weights, prompt) and the marker's, the file by the digest of the photo's pixels: a changed photo, judge or marker
finds nothing. The pairs of a photo are a fixed sequence drawn from its own digest, so asking for more extends it.
"""
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import relations
from relations import MODALITIES, sample_pairs


def _digest(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return h.hexdigest()[:24]


def marker_digest():
    """Digest of everything that decides how a marker looks."""
    return _digest([relations.REFERENCE, relations.RADIUS, relations.LINE, relations.DOT, relations.SMALLEST_MARKER,
                    relations.RED, relations.GREEN])


class Bank:
    """Judgements of one judge.

    folder  where banks are kept;  judge  object with .ask(rgb, pts), .digest(), .size and .grid
    """

    def __init__(self, folder, judge):
        self.judge = judge
        self.folder = Path(folder) / _digest(judge.digest(), marker_digest(), judge.grid)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.asked = self.known = 0

    def _pairs(self, key, n):
        """The first n pairs of a photo, drawn in blocks so that a longer request has the shorter one as its start."""
        block = 16
        rngs = (torch.Generator().manual_seed(int(_digest(key, i)[:15], 16)) for i in range(-(-n // block)))
        return torch.cat([sample_pairs(1, (self.judge.size,) * 2, block, rng, grid=self.judge.grid)[0]
                          for rng in rngs])[:n]

    def _read(self, path):
        try:
            entry = load_file(path)
        except FileNotFoundError:
            return None
        except SafetensorError:
            print(f"bank: {path} is unreadable; asking the judge again", flush=True)
            return None
        return entry["prob"]

    def fill(self, photos, n, device="cpu"):
        """Judgements of n pairs per photo; only unanswered ones are asked.

        photos   (B, 3, S, S) uint8, sRGB, S = judge.size
        returns  pts (B, n, 2, 2) int64 and prob (B, n, M) float32, modalities in the order of MODALITIES
        """
        all_pts = torch.empty(len(photos), n, 2, 2, dtype=torch.int64)
        all_prob = torch.empty(len(photos), n, len(MODALITIES))
        bar = tqdm(range(len(photos)), desc="bank", unit="photo", disable=None if len(photos) > 8 else True,
                   mininterval=1.0)
        for i in bar:
            key = _digest(photos[i].contiguous().numpy().tobytes(), list(photos[i].shape))
            pts, path = self._pairs(key, n), self.folder / f"{key}.safetensors"
            prob = self._read(path)
            have = 0 if prob is None else len(prob)
            if have < n:
                rgb = photos[i:i + 1].to(device).float() / 255
                fresh = self.judge.ask(rgb, pts[None, have:].to(device))[0].float().cpu()
                prob = fresh if prob is None else torch.cat((prob, fresh))
                part = path.with_suffix(f".{os.getpid()}.part")
                save_file(dict(prob=prob.contiguous(), pts=pts.contiguous()), part)
                os.replace(part, path)
            self.known, self.asked = self.known + min(have, n), self.asked + max(0, n - have)
            all_pts[i], all_prob[i] = pts, prob[:n]
        return all_pts, all_prob
