"""The judgement bank: what the judge has answered, on disk, so that no question is ever asked twice.

The judge sees the photo and the points, never the prediction. So one answer serves all G samples, every epoch, rank
and run, and the judge need not be in memory. The folder's name is a digest of the judge (weights, prompt) and the
marker, an entry's name a digest of the photo's pixels: after any of them changes, the old answers are not found. The
pairs of a photo are a fixed sequence that depends only on its digest, so asking for more pairs extends the entry.

entry   pts (P, 2, 2) int16, in pixels of the judge's image, and prob (P, M), the probability of the first answer
files   KEY.safetensors        one entry with a checksum, written atomically; a damaged one is reported and asked again
        pack-NAME.safetensors  many entries, concatenated; a damaged one is renamed pack-NAME.damaged
        Packs are never changed: `pack` writes a new one and then removes the single files whose entries it holds, so
        writers need no lock. 24 bytes a pair (four answers)
"""
import contextlib
import hashlib
import json
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import relations
from data.photos import as_bytes, find_images, read_rgb
from relations import MODALITIES, sample_pairs
from runtime.files import DamageGuard, read_checked, write_tensors
from runtime.ranks import barrier, rank, world

PACK = 64                         # a call that writes at least so many single entries packs them
BLOCK = 16                        # pairs of a photo that are drawn at a time


def _digest(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return h.hexdigest()[:24]


def marker_digest():
    """Digest of everything that decides how a marker looks."""
    return _digest([relations.REFERENCE, relations.RADIUS, relations.LINE, relations.DOT, relations.SMALLEST_MARKER,
                    relations.RED, relations.GREEN])


@dataclass(frozen=True)
class Judgements:
    """Photos and what a judge says of them."""

    rgb: torch.Tensor        # (n, 3, S, S) uint8, sRGB
    pts: torch.Tensor        # (n, P, 2, 2) int64
    prob: torch.Tensor       # (n, P, M) of the first answer, modalities in the order of MODALITIES
    names: list              # n photo paths or scene ids


class Bank:
    """Judgements of one judge.

    folder  where banks are kept;  judge  object with .ask(rgb, pts), .digest(), .size and .grid (judge.py)
    """

    def __init__(self, folder, judge):
        self.judge = judge
        self.folder = Path(folder) / _digest(judge.digest(), marker_digest(), judge.grid)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.asked = 0                                                          # pairs that the judge was asked about
        self.known = 0                                                          # pairs that were found on disk
        self._packs = set()                                                     # paths of the packs that were read
        self._packed = {}                                                       # what they hold: key -> (pts, prob)

    def _pairs(self, key, n):
        """The first n pairs of a photo. They are drawn in blocks, so a longer sequence starts with the shorter one."""
        blocks = []
        for i in range(-(-n // BLOCK)):
            rng = torch.Generator().manual_seed(int(_digest(key, i)[:15], 16))
            blocks.append(sample_pairs(1, (self.judge.size,) * 2, BLOCK, rng, grid=self.judge.grid)[0])
        return torch.cat(blocks)[:n]

    def _load(self, path):
        try:
            return self._check(read_checked(path)[0], path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"bank: {error}; asking the judge again", flush=True)
            with contextlib.suppress(FileNotFoundError):                        # another rank has renamed it
                if path.name.startswith("pack-"):                               # a single entry will be overwritten
                    os.replace(path, path.with_suffix(".damaged"))
            return None

    def _check(self, entry, path):
        """Return an entry or a pack as it was read. raises Refused when the tensors are neither."""
        with DamageGuard(path, "no judgements", "pts, prob, in a pack also keys, counts", "remove it"):
            pts = entry["pts"]
            prob = entry["prob"]
            n = len(prob)
            good = (pts.dtype == torch.int16 and pts.shape == (n, 2, 2) and prob.shape == (n, len(MODALITIES))
                    and ((pts >= 0) & (pts < self.judge.size)).all()
                    and ((prob >= 0) & (prob <= 1) | prob.isnan()).all())       # NaN: not known
            if path.name.startswith("pack-"):
                keys = entry["keys"]
                counts = entry["counts"]
                good = good and (keys.dtype == torch.uint8 and keys.ndim == 2 and counts.shape == keys.shape[:1]
                                 and counts.dtype == torch.int64 and (counts >= 0).all() and counts.sum() == n)
            if not good:
                raise ValueError("other shapes or values")
        return entry

    def _read_packs(self):
        """All entries of all packs: dict key -> (pts, prob). Of two entries of a photo the longer one is taken.

        A pack never changes, so it is read once.
        """
        for path in sorted(set(self.folder.glob("pack-*.safetensors")) - self._packs):
            self._packs.add(path)
            pack = self._load(path)
            if pack is not None:
                counts = pack["counts"].tolist()
                for key, pts, prob in zip(pack["keys"].numpy(), pack["pts"].split(counts), pack["prob"].split(counts),
                                          strict=True):
                    key = key.tobytes().hex()
                    if len(prob) > _length(self._packed.get(key)):
                        self._packed[key] = (pts, prob)
        return self._packed

    def _write(self, path, **tensors):
        write_tensors(path, tensors)

    def pack(self):
        """Put all single entries into one new pack. Safe when other processes write or pack, and when it is killed."""
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
                    counts=torch.tensor(lengths), pts=torch.cat([e["pts"] for _, e in entries]),
                    prob=torch.cat([e["prob"] for _, e in entries]))
        for (path, entry), n in zip(entries, lengths, strict=True):
            again = self._load(path)
            if again is not None and len(again["prob"]) == n and torch.equal(again["prob"], entry["prob"]):
                path.unlink(missing_ok=True)                                    # kept if another writer extended it

    def fill_together(self, photos, n, device="cpu"):
        """As `fill`, called by all ranks: each asks about its share of the photos."""
        if world() > 1:
            self.fill(photos[rank()::world()], n, device)
            barrier()
        return self.fill(photos, n, device)

    def fill(self, photos, n, device="cpu"):
        """Judgements of n pairs per photo; only unanswered ones are asked.

        photos   (B, 3, S, S) uint8, sRGB, S = judge.size
        returns  pts (B, n, 2, 2) int64 and prob (B, n, M) float32, modalities in the order of MODALITIES
        """
        all_pts = torch.empty(len(photos), n, 2, 2, dtype=torch.int64)
        all_prob = torch.empty(len(photos), n, len(MODALITIES))
        packs = self._read_packs()
        written = 0
        bar = tqdm(range(len(photos)), desc="bank", unit="photo", disable=None if len(photos) > 8 else True,
                   mininterval=1.0)
        for i in bar:
            key = _digest(photos[i].contiguous().numpy().tobytes(), list(photos[i].shape))
            path = self.folder / f"{key}.safetensors"
            entry = packs.get(key)
            if _length(entry) < n:                                              # a single file may hold more pairs
                single = self._load(path)
                if single is not None and len(single["prob"]) > _length(entry):
                    entry = single["pts"], single["prob"]
            have = _length(entry)
            if have < n:
                pts = self._pairs(key, n)
                rgb = photos[i:i + 1].to(device).float() / 255
                fresh = self.judge.ask(rgb, pts[None, have:].to(device))[0].float().cpu()
                entry = pts, fresh if entry is None else torch.cat((entry[1], fresh))
                self._write(path, prob=entry[1], pts=pts.to(torch.int16))
                written += 1
            self.known += min(have, n)
            self.asked += max(0, n - have)
            all_pts[i] = entry[0][:n]
            all_prob[i] = entry[1][:n]
        if written >= PACK:
            self.pack()
        return all_pts, all_prob


def _length(entry):
    """Number of pairs of an entry (pts, prob), or 0 for None."""
    return 0 if entry is None else len(entry[1])


def fill_bank(folder, images, judge, pairs, device):
    """Ask about every photo of a folder ahead of time; this rank's share of them. Returns a Bank with its counts.

    Resumes where it stopped; a photo that cannot be read is named and skipped, as Photos does.
    """
    bank = Bank(folder, judge)
    chunk = 8
    paths = find_images(images)[rank()::world()]
    bar = tqdm(range(0, len(paths), chunk), desc=f"bank, process {rank() + 1} of {world()}", unit="8 photos",
               mininterval=1.0)
    for i in bar:
        photos = []
        for path in paths[i:i + chunk]:
            try:
                photos.append(as_bytes(read_rgb(path), judge.size))
            except (ValueError, OSError) as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        if photos:
            bank.fill(torch.stack(photos), pairs, device)
    bank.pack()
    return bank
