"""The photos of a GRPO run, and what the judge says of them: those it learns from, and those held out from it.

sizes     the judge is asked about photos of its side, the policy sees them at that of training. Both are the same
          centred square: a judged point becomes the pixel that holds the centre of the marked one
held out  of --images: the photos whose digest is among the lowest twentieth of all possible ones, and at least the
          HELD_OUT different ones with the lowest; of HELD_OUT or fewer, half. No step trains on them. Order, names and
          sizes do not matter, copies of a photo stay together, and of more than HELD_OUT a photo that was trained on
          stays so when others are added
"""
import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from data.bank import Judgements
from data.oracle import Oracle
from data.orders import open_bank
from data.photos import Photos, find_images, photo_paths
from data.pools import ScenePool, scene_pool
from relations import sample_pairs
from runtime.config import UserError
from runtime.ranks import STREAMS, combine_numbers, generator, say

HELD_OUT = 8                      # least number of photos that are held out, where there are more
SHARE = 20                        # one in so many is


def hold_out(digests):
    """Which photos are held out: list of photos.pixel_digest -> (n,) bool."""
    different = sorted(set(digests))
    if len(different) > HELD_OUT:
        bound = max(different[HELD_OUT - 1], f"{(1 << 64) // SHARE:016x}")
    else:
        bound = max(different[:len(different) // 2], default="")
    return torch.tensor([digest <= bound for digest in digests])


def too_few(folder):
    """The error for a folder of one photo, which leaves none to measure on."""
    return UserError(f"train.py: got 1 photo in {folder}; want at least 2, better {2 * HELD_OUT} or more: some are "
                     "held out to measure on, and no step trains on them")


def check_count(folder, out):
    """Refuse a folder with too few files to be photos, before any is read. out: of find_images. raises UserError."""
    n = len(find_images(folder, out, say=False))
    if n < 2:
        raise too_few(folder)


def held_out_digest(photos):
    """Digest of the photos held out from those of read_album; "" where there are none."""
    if photos is None:
        return ""
    held = hold_out(photos.digests).tolist()
    names = sorted({digest for digest, is_held in zip(photos.digests, held, strict=True) if is_held})
    return hashlib.blake2b("".join(names).encode(), digest_size=8).hexdigest()


def read_album(cfg, judge):
    """The photos of --images at two sizes; all ranks call. None without --images: procedural photos are made, not read.

    cfg      images, photos, size, out of runtime.config.Config;  judge  judge.AnyJudge
    returns  Photos: as many as leave cfg.photos to train on
    raises   UserError: too few, or the ranks can read different numbers of photos
    """
    if not cfg.images:
        return None
    photos = Photos(cfg.images, cfg.size, cfg.photos + max(HELD_OUT, cfg.photos // (SHARE - 1)), cfg.out, judge.size)
    found = combine_numbers(dict(n_min=len(photos), n_max=len(photos)))
    if found["n_min"] != found["n_max"]:
        raise UserError(f"train.py: processes can read different numbers of the photos in {cfg.images}; "
                        "want a folder that all of them see alike")
    n = int(hold_out(photos.digests).sum())
    if not n:
        raise too_few(cfg.images)
    if n < HELD_OUT:
        say(f"train.py: only {n} of {len(photos)} photos held out to measure on; more photos make a fairer measure")
    return photos


def move_points(pts, size, to):
    """Points in pixels of a photo of side `size` in those of side `to`: where the centre of the marked pixel lies."""
    return ((2 * pts + 1) * to).div(2 * size, rounding_mode="floor")


def part_photos(judged, held, most):
    """Judgements to train on, at most so many, and those held out (n, bool). The photos' memory is used again."""
    rest = (~held).nonzero()[:most, 0]
    apart = replace(judged, rgb=judged.rgb[held], pts=judged.pts[held], prob=judged.prob[held],
                    names=[judged.names[i] for i in held.nonzero()[:, 0]])
    for place, i in enumerate(rest.tolist()):                                   # place <= i
        judged.rgb[place] = judged.rgb[i]
    return replace(judged, rgb=judged.rgb[:len(rest)], pts=judged.pts[rest], prob=judged.prob[rest],
                   names=[judged.names[i] for i in rest]), apart


def procedural_photos(n, size, device):
    """Photos of n procedural wild scenes: (n, 3, size, size) uint8."""
    pool = ScenePool("wild", "train", n, size, keys=("rgb",), device=device)
    return (pool.all()["rgb"] * 255).round().byte()


def oracle_judgements(cfg, device, modalities):
    """Procedural photos, and the answers that their true maps give, wrong as often as the paper's judge."""
    scenes = scene_pool("wild", "train", cfg.photos, cfg.size, device=device).all()
    names = [f"wild {i}" for i in range(len(scenes["rgb"]))]
    rng = generator(cfg.seed, STREAMS["oracle"])
    pts = sample_pairs(len(names), (cfg.size, cfg.size), cfg.bank_pairs, rng, mask=scenes["mask"])
    prob = Oracle(scenes, rng).ask(scenes["rgb"], pts, names, modalities)
    return Judgements((scenes["rgb"] * 255).round().byte(), pts, prob, names)


def judgements(cfg, judge, device, modalities, photos=None, train=True):
    """What the judge says of a run's photos, asked once and kept in the judgement bank; all ranks call.

    judge       judge.AnyJudge, or None: the oracle;  modalities  of the predictor: no others are asked about
    photos      of read_album; its images are used up;  None: procedural ones
    train       False: those to train on are not wanted, so procedural ones are not made
    returns     data.bank.Judgements to train on, points in pixels of cfg.size; those held out. None: there are none
    """
    if photos is None and not train:
        return None, None
    if judge is None:
        return oracle_judgements(cfg, device, modalities), None
    if photos is None:
        rgb = procedural_photos(cfg.photos, cfg.size, device)
        seen = rgb if judge.size == cfg.size else procedural_photos(cfg.photos, judge.size, device)
        names = [f"wild {i}" for i in range(len(rgb))]
        what = f"{len(rgb)} procedural wild photos"
    else:
        rgb, seen, names = photos.images, photos.seen, photos.names
        held = hold_out(photos.digests)
        what = (f"{len(rgb)} photos of {cfg.images} ({len(photos.skipped)} unreadable), of which {int(held.sum())} are "
                "held out")
    bank = open_bank(cfg.bank or Path(cfg.out) / "bank", judge, cfg.both_orders)
    pts, prob = bank.fill_together(seen, cfg.bank_pairs, device, photo_paths(cfg.images, names), modalities)
    say(f"grpo: {what}; judgement bank: {bank.describe()}")
    pts = move_points(pts, judge.size, cfg.size)
    is_one = (pts[..., 0, :] == pts[..., 1, :]).all(-1, keepdim=True)           # a smaller photo may join two points
    judged = Judgements(rgb, pts, prob.masked_fill(is_one, torch.nan), names)
    return (judged, None) if photos is None else part_photos(judged, held, cfg.photos)
