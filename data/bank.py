"""The judgement bank: what the judge has answered, on disk, so that no question is ever asked twice.

The judge sees the photo and the points, never the prediction. So one answer serves all G samples, every epoch, rank
and run, and the judge need not be in memory. The folder's name is a digest of the judge (weights, prompt) and the
marker, an entry's name a digest of the photo's pixels: after any of them changes, the old answers are not found. The
pairs of a photo are a fixed sequence that depends only on its digest, so asking for more pairs extends the entry.

entry   pts (P, 2, 2) int16, in pixels of the judge's image, and prob (P, M), the probability of the first answer;
        NaN: not asked yet, infinity: asked, and the judge does not know. Two entries of a photo are merged
files   KEY.safetensors        one entry with a checksum, written atomically; a damaged one is reported and asked again
        pack-NAME.safetensors  many entries, concatenated; a damaged one is renamed pack-NAME.damaged
        Packs are never changed: `pack` writes a new one and then removes the single files whose entries it holds, so
        writers need no lock. 24 bytes a pair (four answers)
"""
import contextlib
import hashlib
import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import relations
from data.photos import as_bytes, find_images, readable_photos
from relations import NAMES, sample_pairs
from runtime.config import UserError
from runtime.files import DamageGuard, find_files, read_checked, write_tensors
from runtime.ranks import barrier, rank, world

UNKNOWN = float("inf")            # on disk: asked, and the judge gave no probability
PACK = 64                         # a call that writes at least so many single entries packs them
BLOCK = 16                        # pairs of a photo that are drawn at a time
KEY = re.compile("[0-9a-f]{24}")  # name of a single entry


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

    def __post_init__(self):
        """raises UserError: the judge knows no answer, so nothing can be learnt from it."""
        if self.prob.numel() and not self.prob.isfinite().any():
            raise UserError(f"train.py: the judge knows no answer about any of {len(self.names)} photos (first: "
                            f"{self.names[0]!r}); want a judge of these photos and of the predictor's modalities")


class Bank:
    """Judgements of one judge.

    folder  where banks are kept;  judge  object with .ask, .digest, .size and .grid (judge.AnyJudge)
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
        """Return an entry or a pack as it was read. raises Refusal when the tensors are neither."""
        with DamageGuard(path, "no judgements", "pts, prob, in a pack also keys, counts", "remove it"):
            pts = entry["pts"]
            prob = entry["prob"]
            n = len(prob)
            good = (pts.dtype == torch.int16 and pts.shape == (n, 2, 2) and prob.shape == (n, len(NAMES))
                    and ((pts >= 0) & (pts < self.judge.size)).all()
                    and ((prob >= 0) & (prob <= 1) | prob.isnan() | (prob == UNKNOWN)).all())
            if path.name.startswith("pack-"):
                keys = entry["keys"]
                counts = entry["counts"]
                good = good and (keys.dtype == torch.uint8 and keys.ndim == 2 and counts.shape == keys.shape[:1]
                                 and counts.dtype == torch.int64 and (counts >= 0).all() and counts.sum() == n)
            if not good:
                raise ValueError("other shapes or values")
        return entry

    def _read_packs(self):
        """All entries of all packs: dict key -> (pts, prob). A pack never changes, so it is read once."""
        for path in sorted(set(self.folder.glob("pack-*.safetensors")) - self._packs):
            self._packs.add(path)
            pack = self._load(path)
            if pack is not None:
                counts = pack["counts"].tolist()
                for key, *entry in zip(pack["keys"].numpy(), pack["pts"].split(counts), pack["prob"].split(counts),
                                       strict=True):
                    key = key.tobytes().hex()
                    self._packed[key] = merge_entries(self._packed.get(key), entry)
        return self._packed

    def entries(self):
        """All that is known: dict key of a photo -> (pts (P, 2, 2), prob (P, M)) as on disk."""
        single = [(p.stem, self._load(p)) for p in find_files(self.folder, "*.safetensors") if KEY.fullmatch(p.stem)]
        known = dict(self._read_packs())                                        # read last: a packer removes files
        for key, entry in single:
            if entry is not None:
                known[key] = merge_entries(known.get(key), (entry["pts"], entry["prob"]))
        return known

    def describe(self):
        """How many pairs were asked and known, as text."""
        return f"{self.asked} pairs asked, {self.known} already known"

    def pack(self):
        """Put all single entries into one new pack. Safe when other processes write or pack, and when it is killed."""
        single = [p for p in find_files(self.folder, "*.safetensors") if KEY.fullmatch(p.stem)]
        loaded = [(p, self._load(p)) for p in single]
        entries = [(p, e) for p, e in loaded if e is not None]
        if not entries:
            return
        keys = [p.stem for p, _ in entries]
        lengths = [len(e["prob"]) for _, e in entries]
        name = _digest(keys, lengths, uuid.uuid4().hex)
        write_tensors(self.folder / f"pack-{name}.safetensors", dict(
            keys=torch.tensor([list(bytes.fromhex(k)) for k in keys], dtype=torch.uint8),
            counts=torch.tensor(lengths), pts=torch.cat([e["pts"] for _, e in entries]),
            prob=torch.cat([e["prob"] for _, e in entries])))
        for (path, entry), n in zip(entries, lengths, strict=True):
            again = self._load(path)
            if again is not None and len(again["prob"]) == n and again["prob"].numpy().tobytes() == (
                    entry["prob"].numpy().tobytes()):
                path.unlink(missing_ok=True)                                    # kept if another writer extended it

    def fill_together(self, photos, n, device="cpu", names=None, modalities=NAMES):
        """As `fill`, called by all ranks: each asks about its share of the photos."""
        if world() > 1:
            own = slice(rank(), None, world())
            self.fill(photos[own], n, device, names and names[own], modalities)
            barrier()
        return self.fill(photos, n, device, names, modalities)

    def fill(self, photos, n, device="cpu", names=None, modalities=NAMES):
        """Judgements of n pairs per photo; only what is missing is asked.

        photos      (B, 3, S, S) uint8, sRGB, S = judge.size;  names  of the photos, for the judge
        modalities  the questions wanted
        returns     pts (B, n, 2, 2) int64 and prob (B, n, M) float32, modalities in the order of MODALITIES; NaN where
                    nothing is known
        """
        all_pts = torch.empty(len(photos), n, 2, 2, dtype=torch.int64)
        all_prob = torch.empty(len(photos), n, len(NAMES))
        wanted = torch.tensor([m in modalities for m in NAMES])
        packs = self._read_packs()
        written = 0
        bar = tqdm(range(len(photos)), desc="bank", unit="photo", disable=None if len(photos) > 8 else True,
                   mininterval=1.0)
        for i in bar:
            key = _digest(photos[i].contiguous().numpy().tobytes(), list(photos[i].shape))
            entry = packs.get(key)
            missing = _missing(entry, n, wanted)                                # (n, M)
            if missing.any():                                                   # a single file may hold more
                single = self._load(self.folder / f"{key}.safetensors")
                entry = merge_entries(entry, single and (single["pts"], single["prob"]))
                missing = _missing(entry, n, wanted)
            asked = int(missing.any(1).sum())
            if entry is None or len(entry[1]) < n:
                entry = merge_entries(entry, (self._pairs(key, n), torch.full((n, len(NAMES)), torch.nan)))
            pts, prob = entry
            if asked:
                rgb = photos[i:i + 1].to(device).float() / 255
                prob = self._ask(rgb, pts, prob, missing, names and names[i:i + 1])
                write_tensors(self.folder / f"{key}.safetensors", dict(prob=prob, pts=pts.to(torch.int16)))
                written += 1
            self.known += n - asked
            self.asked += asked
            all_pts[i] = pts[:n]
            all_prob[i] = prob[:n].masked_fill(prob[:n] == UNKNOWN, torch.nan)
        if written >= PACK:
            self.pack()
        return all_pts, all_prob

    def _ask(self, rgb, pts, prob, missing, names):
        """Ask about one photo what is missing (n, M): prob (>= n, M) with the answers."""
        prob = prob.clone()
        for columns in missing.unique(dim=0):                                   # pairs that lack the same answers
            if columns.any():
                rows = (missing == columns).all(1).nonzero()[:, 0]
                questions = [m for m, lacks in zip(NAMES, columns.tolist(), strict=True) if lacks]
                fresh = self.judge.ask(rgb, pts[None, rows].to(rgb.device), names, questions)[0].float().cpu()
                fresh = fresh.masked_fill(fresh.isnan(), UNKNOWN)[:, columns]
                prob[rows[:, None], columns.nonzero()[:, 0]] = fresh
        return prob


def merge_entries(one, two):
    """Entry that knows what either of two of a photo knows; each is (pts (P, 2, 2), prob (P, M)), or None."""
    if not one or not two:
        return one or two
    (pts, prob), (_, other) = (one, two) if len(one[1]) >= len(two[1]) else (two, one)
    other = torch.cat((other, torch.full_like(prob[len(other):], torch.nan)))
    return pts, torch.where(prob.isnan(), other, prob)


def _missing(entry, n, wanted):
    """Which of the first n pairs lack a wanted answer: (n, M) bool."""
    have = min(n, len(entry[1])) if entry else 0
    missing = wanted.repeat(n, 1)
    if have:
        missing[:have] &= entry[1][:have].isnan()
    return missing


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
        found = [(path, as_bytes(rgb, judge.size)) for path, rgb in readable_photos(paths[i:i + chunk], [])]
        if found:
            names, photos = zip(*found, strict=True)
            bank.fill(torch.stack(photos), pairs, device, [str(name) for name in names])
    bank.pack()
    return bank
