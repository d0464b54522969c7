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
time    photos are read and looked up ahead, answers are written behind, both in threads: the judge waits for neither.
        A kill loses what was answered in the last SECONDS, and the call under way; an error of the judge loses nothing
"""
import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import relations
from data.photos import as_bytes, find_images, readable_photos
from relations import NAMES, sample_pairs
from runtime.ahead import work_ahead
from runtime.config import UserError
from runtime.files import DamageGuard, find_files, read_checked, write_tensors
from runtime.ranks import barrier, rank, world

UNKNOWN = float("inf")            # on disk: asked, and the judge gave no probability
PACK = 64                         # so many single entries of one call are packed; so many at a time are written as one
SECONDS = 5.0                     # answers are written so often: what a kill may lose. A slow judge's, each at once
AHEAD = 32                        # photos that are read before their turn
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
        self._entries = {}                                                      # of packs, and answered, by key

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
                    self._entries[key] = merge_entries(self._entries.get(key), entry)
        return self._entries

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
        self.write_pack({p.stem: (e["pts"], e["prob"]) for p, e in entries})
        for path, entry in entries:
            again = self._load(path)
            if again is not None and again["prob"].numpy().tobytes() == entry["prob"].numpy().tobytes():
                path.unlink(missing_ok=True)                                    # kept if another writer extended it

    def write_pack(self, entries):
        """Write a pack of entries: dict of key -> (pts (P, 2, 2), prob (P, M))."""
        keys = list(entries)
        lengths = [len(prob) for _, prob in entries.values()]
        name = _digest(keys, lengths, uuid.uuid4().hex)
        write_tensors(self.folder / f"pack-{name}.safetensors", dict(
            keys=torch.tensor([list(bytes.fromhex(k)) for k in keys], dtype=torch.uint8),
            counts=torch.tensor(lengths), pts=torch.cat([pts.to(torch.int16) for pts, _ in entries.values()]),
            prob=torch.cat([prob for _, prob in entries.values()])))

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
        bar = tqdm(desc="bank", unit="photo", total=len(photos), disable=None if len(photos) > 8 else True,
                   mininterval=1.0)

        def read(i):
            return [(names[i] if names else "", photos[i])]

        with bar, contextlib.closing(self.judge_each(range(len(photos)), read, n, device, modalities)) as answers:
            for i, (pts, prob) in enumerate(answers):
                all_pts[i] = pts
                all_prob[i] = prob
                bar.update()
        return all_pts, all_prob

    def judge_each(self, items, read, n, device="cpu", modalities=NAMES):
        """As `fill`, photo by photo: yields pts (n, 2, 2) and prob (n, M).

        read  of an item: list of (name or "", photo (3, S, S) uint8); called ahead of time, in threads
        A judge with `photos_a_call` is asked about so many photos at a time, where they lack the same answers.
        """
        wanted = torch.tensor([m in modalities for m in NAMES])
        most = getattr(self.judge, "photos_a_call", 1)
        self._read_packs()
        group = []
        with _Writer(self) as writer:
            for photos in work_ahead(lambda item: [self._open(*x, n, wanted) for x in read(item)], items, AHEAD):
                for one in photos:
                    if one.key in [other.key for other in group]:               # the same photo again
                        yield from self._finish(group, n, device, writer)
                    one.know(self._entries.get(one.key), n, wanted)             # answers since it was opened
                    if group and not one.missing.equal(group[0].missing):
                        yield from self._finish(group, n, device, writer)
                    group.append(one)
                    if len(group) >= most or not one.missing.any():
                        yield from self._finish(group, n, device, writer)
            yield from self._finish(group, n, device, writer)
        if writer.singles >= PACK:
            self.pack()

    def _open(self, name, photo, n, wanted):
        """A photo with all that is known about its first n pairs."""
        key = _digest(photo.contiguous().numpy().tobytes(), list(photo.shape))
        one = _Photo(name, photo, key)
        one.know(self._entries.get(key), n, wanted)
        if one.missing.any():                                                   # a single file may hold more
            single = self._load(self.folder / f"{key}.safetensors")
            one.know(single and (single["pts"], single["prob"]), n, wanted)
        if one.entry is None or len(one.entry[1]) < n:
            one.know((self._pairs(key, n), torch.full((n, len(NAMES)), torch.nan)), n, wanted)
        return one

    def _finish(self, group, n, device, writer):
        """Ask about photos that lack the same answers; yields what `judge_each` does, and empties the list."""
        asked = int(group[0].missing.any(1).sum()) if group else 0
        if asked:
            for one, prob in zip(group, self._ask(group, n, device), strict=True):
                one.entry = merge_entries(one.entry, (one.entry[0][:n], prob))
                self._entries[one.key] = one.entry
                writer.add(one.key, one.entry)
        self.known += (n - asked) * len(group)
        self.asked += asked * len(group)
        for one in group:
            pts, prob = one.entry
            yield pts[:n].long(), prob[:n].masked_fill(prob[:n] == UNKNOWN, torch.nan)
        group.clear()

    def _ask(self, group, n, device):
        """Ask about photos of one `missing` (n, M): answers (B, n, M) where those are missing, NaN elsewhere."""
        rgb = torch.stack([one.rgb for one in group]).to(device).float() / 255
        pts = torch.stack([one.entry[0][:n].long() for one in group]).to(device)
        names = [one.name for one in group] if group[0].name else None
        missing = group[0].missing
        prob = torch.full((len(group), *missing.shape), torch.nan)
        for columns in missing.unique(dim=0):                                   # pairs that lack the same answers
            if columns.any():
                rows = (missing == columns).all(1)
                questions = [m for m, lacks in zip(NAMES, columns.tolist(), strict=True) if lacks]
                fresh = self.judge.ask(rgb, pts[:, rows], names, questions).float().cpu()
                prob[:, rows] = fresh.masked_fill(fresh.isnan(), UNKNOWN).masked_fill(~columns, torch.nan)
        return prob


@dataclass
class _Photo:
    """A photo that is opened for `judge_each`."""

    name: str
    rgb: torch.Tensor                # (3, S, S) uint8
    key: str
    entry: tuple = None              # what is known: pts (P, 2, 2), prob (P, M)
    missing: torch.Tensor = None     # (n, M) bool: wanted answers that it lacks

    def know(self, entry, n, wanted):
        """Add what another entry knows."""
        self.entry = merge_entries(self.entry, entry)
        self.missing = _missing(self.entry, n, wanted)


class _Writer:
    """With-block that writes a bank's answers behind the asking; what is left is written at its end, after errors too.

    .singles  files of one entry that were written
    """

    def __init__(self, bank):
        self.bank = bank
        self.singles = 0
        self.waiting = {}                                                       # key -> entry
        self.began = time.monotonic()                                           # the last write
        self.under_way = None                                                   # its Future
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self.pool:
            self._begin()
            self._wait()

    def add(self, key, entry):
        """Write an entry soon. raises OSError of an earlier write."""
        self.waiting[key] = entry
        if time.monotonic() - self.began >= SECONDS:
            self._begin()

    def _begin(self):
        self._wait()
        entries, self.waiting = self.waiting, {}
        self.began = time.monotonic()
        if len(entries) >= PACK:
            self.under_way = self.pool.submit(self.bank.write_pack, entries)
        elif entries:
            self.singles += len(entries)
            self.under_way = self.pool.submit(self._write_singles, entries)

    def _wait(self):
        if self.under_way:
            self.under_way.result()
        self.under_way = None

    def _write_singles(self, entries):
        for key, (pts, prob) in entries.items():
            write_tensors(self.bank.folder / f"{key}.safetensors", dict(prob=prob, pts=pts.to(torch.int16)))


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
    paths = find_images(images)[rank()::world()]

    def read(path):
        return [(str(path), as_bytes(rgb, judge.size)) for _, rgb in readable_photos([path], [])]

    bar = tqdm(paths, desc=f"bank, process {rank() + 1} of {world()}", unit="photo", mininterval=1.0)
    for _ in bank.judge_each(bar, read, pairs, device):
        pass
    bank.pack()
    return bank
