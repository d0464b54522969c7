"""The judgement bank: what the judge has answered, on disk, so that no question is ever asked twice.

The judge sees the photo and the points, never the prediction: an answer serves all G samples, every epoch, rank and
run, with the judge itself not in memory. The folder is named by the judge's digest (weights, prompt) and the marker's,
an entry by the digest of the photo's pixels: a changed photo, judge or marker finds nothing. The pairs of a photo are a
fixed sequence drawn from its own digest, so asking for more extends it.

entry   pts (P, 2, 2) int16, in pixels of the judge's image, and prob (P, M), the probability of the first answer
files   KEY.safetensors, one entry, renamed when whole, with a checksum: a damaged one is named and asked about again;
        pack-NAME.safetensors, many entries behind each other; a damaged one becomes pack-NAME.damaged.
        Packs are never changed: `pack` writes a new one and then removes the single files it holds, so writers need no
        lock. 24 bytes a pair (four answers)
"""
import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

import relations
from files import DamageGuard, read_checked, write_tensors
from relations import MODALITIES, sample_pairs

PACK = 64                         # single entries written by one call that are worth a pack

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

    def _load(self, path):
        try:
            return self._checked(read_checked(path)[0], path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"bank: {error}; asking the judge again", flush=True)
            with contextlib.suppress(FileNotFoundError):                        # another rank was first
                if path.name.startswith("pack-"):                               # a single entry is written over
                    os.replace(path, path.with_suffix(".damaged"))
            return None

    def _checked(self, entry, path):
        """An entry or a pack as it was read. raises Refusal for tensors that are neither."""
        with DamageGuard(path, "no judgements", "pts, prob, in a pack also keys, counts", "remove it"):
            pts, prob, n = entry["pts"], entry["prob"], len(entry["prob"])
            good = (pts.dtype == torch.int16 and pts.shape == (n, 2, 2) and prob.shape == (n, len(MODALITIES))
                    and ((pts >= 0) & (pts < self.judge.size)).all() and ((prob >= 0) & (prob <= 1)).all())
            if path.name.startswith("pack-"):
                keys, counts = entry["keys"], entry["counts"]
                good = good and (keys.dtype == torch.uint8 and keys.ndim == 2 and counts.shape == keys.shape[:1]
                                 and counts.dtype == torch.int64 and (counts >= 0).all() and counts.sum() == n)
            if not good:
                raise ValueError("other shapes or values")
        return entry

    def _packed(self):
        """All entries of all packs: dict key -> (pts, prob); the longer of two for one photo."""
        found = {}
        for path in sorted(self.folder.glob("pack-*.safetensors")):
            pack = self._load(path)
            if pack is not None:
                counts = pack["counts"].tolist()
                for key, pts, prob in zip(pack["keys"].numpy(), pack["pts"].split(counts), pack["prob"].split(counts),
                                          strict=True):
                    key = key.tobytes().hex()
                    if key not in found or len(found[key][1]) < len(prob):
                        found[key] = (pts, prob)
        return found

    def _write(self, path, **tensors):
        write_tensors(path, tensors)

    def pack(self):
        """Put all single entries into one new pack. Safe beside other writers and other packers, and under a kill."""
        single = [p for p in sorted(self.folder.glob("*.safetensors")) if not p.name.startswith("pack-")]
        loaded = [(p, self._load(p)) for p in single]
        entries = [(p, e) for p, e in loaded if e is not None]
        if not entries:
            return
        keys = [p.stem for p, _ in entries]
        lengths = [len(e["prob"]) for _, e in entries]
        name = _digest(keys, lengths, uuid.uuid4().hex)
        self._write(self.folder / f"pack-{name}.safetensors",
                    keys=torch.tensor([list(bytes.fromhex(k)) for k in keys], dtype=torch.uint8),
                    counts=torch.tensor(lengths), pts=torch.cat([e["pts"].to(torch.int16) for _, e in entries]),
                    prob=torch.cat([e["prob"] for _, e in entries]))
        for (path, entry), n in zip(entries, lengths, strict=True):
            again = self._load(path)
            if again is not None and len(again["prob"]) == n and torch.equal(again["prob"], entry["prob"]):
                path.unlink(missing_ok=True)                                    # not if another writer has extended it

    def fill(self, photos, n, device="cpu"):
        """Judgements of n pairs per photo; only unanswered ones are asked.

        photos   (B, 3, S, S) uint8, sRGB, S = judge.size
        returns  pts (B, n, 2, 2) int64 and prob (B, n, M) float32, modalities in the order of MODALITIES
        """
        all_pts = torch.empty(len(photos), n, 2, 2, dtype=torch.int64)
        all_prob = torch.empty(len(photos), n, len(MODALITIES))
        packed, written = self._packed(), 0
        bar = tqdm(range(len(photos)), desc="bank", unit="photo", disable=None if len(photos) > 8 else True,
                   mininterval=1.0)
        for i in bar:
            key = _digest(photos[i].contiguous().numpy().tobytes(), list(photos[i].shape))
            path, (pts, prob) = self.folder / f"{key}.safetensors", packed.get(key, (None, None))
            have = 0 if prob is None else len(prob)
            if have < n:                                                        # perhaps a single entry knows more
                entry = self._load(path)
                if entry is not None and len(entry["prob"]) > have:
                    pts, prob = entry["pts"], entry["prob"]
                    have = len(prob)
            if have < n:
                pts = self._pairs(key, n)
                rgb = photos[i:i + 1].to(device).float() / 255
                fresh = self.judge.ask(rgb, pts[None, have:].to(device))[0].float().cpu()
                prob = fresh if prob is None else torch.cat((prob, fresh))
                self._write(path, prob=prob, pts=pts.to(torch.int16))
                written += 1
            self.known, self.asked = self.known + min(have, n), self.asked + max(0, n - have)
            all_pts[i], all_prob[i] = pts[:n], prob[:n]
        if written >= PACK:
            self.pack()
        return all_pts, all_prob
