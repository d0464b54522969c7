"""Questions with true answers from scene folders: what a judge is tuned on and measured by.

row       dict: id, scene, modality, pts [[row, col], [row, col]] red first in pixels of the tile, first (True: answer
          one is right), margin (relations.margin), or image (a path) instead of pts where markers are drawn already
drawn     from a scene's own random numbers (seed, scene id): other scenes in the folder change nothing
balanced  red and green exactly, by exchanging the colours; as many "same" as "different" albedos over all rows
refused   as answers: dead zones, invalid pixels, irradiance where the albedo is black (nothing is known there)
split     by scene, never by question: an id up to its first "." is the room, so a room is on one side only
files     JSON lines as InternVL's trainer and the judge release read them: id, image, width, height, conversations
"""
import hashlib
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import photos
import pictures
import pools
from files import DamageGuard, decode_json, path_inside, read_json, refuse, write_json
from relations import LUMA, MODALITIES, draw_markers, margin, relation, sample_pairs
from runtime import generator

BLACK = 0.1                       # encoded luma (1 % linear) of an albedo that shows no light
DRAWN = 24                        # candidates per wanted question
SHARE = 0.1                       # of the rooms that are held out
ORACLE = "oracle"                 # --judge: true answers of procedural photos, wrong as often as the paper's judge
PAPER_ACCURACY = dict(depth=0.962, normal=0.935, albedo=0.894, irradiance=0.876)     # ReasonX, held-out judge accuracy
JSONL = {"train": "intrinsic_judgement_train.jsonl", "val": "intrinsic_judgement_val.jsonl"}


def true_relations(maps, pts):
    """Relations of all modalities from ground truth: (B, P, M) int8; 0 where a point is invalid."""
    nan = {m: maps[m].masked_fill(~maps["mask"], torch.nan) for m in MODALITIES}
    return torch.stack([relation(nan[m], pts, m) for m in MODALITIES], -1)


def oracle_answers(maps, n, rng):
    """Answers of a judge that knows the truth and errs as often as the paper's: what a better judge would be worth.

    maps     dict of (B, C, H, W) with mask and every modality
    returns  pts (B, n, 2, 2) and prob (B, n, M) of the first answer: the accuracy or one minus it; 0.5 in the dead zone
    """
    B, _, H, W = maps["rgb"].shape
    pts = sample_pairs(B, (H, W), n, rng, mask=maps["mask"])
    truth = true_relations(maps, pts).float()                                   # (B, n, M)
    right = torch.tensor([PAPER_ACCURACY[m] for m in MODALITIES])
    sign = torch.where(torch.rand(truth.shape, generator=rng) < right, 1.0, -1.0)
    return pts, 0.5 + (right - 0.5) * sign * truth


def split_of(scene, share=SHARE):
    """"train" or "val", by the room a scene id names: a tenth of all rooms is held out, on every machine the same."""
    room = scene.split(".")[0]
    return "val" if int(hashlib.sha256(room.encode()).hexdigest()[:8], 16) < share * 2**32 else "train"


def draw(folder, scene, n, size, seed, grid=1):
    """Up to n questions per modality about one scene, drawn at `size` px: list of rows.

    raises  ValueError: normals zero everywhere, constant depth; as pools.read_scene
    """
    maps = pools.read_scene(folder, scene, size)
    where = f"questions.py: {scene}_%s.png in {str(folder)!r}"
    if not maps["mask"].any():
        raise ValueError(f"{where % 'normal'}: got all-zero normals, want (n + 1) / 2; they mark every pixel invalid")
    depth = maps["depth"][maps["mask"]]
    if depth.min() == depth.max():
        raise ValueError(f"{where % 'depth'}: got one depth ({depth[0]:.4f}) everywhere, want near and far; export it "
                         "again")
    rng = generator(seed, int(hashlib.sha256(scene.encode()).hexdigest()[:15], 16))
    pts = sample_pairs(1, (size, size), DRAWN * n, rng, mask=maps["mask"][None], grid=grid)[0]   # (K, 2, 2)
    luma = torch.einsum("chw,c->hw", maps["albedo"], torch.tensor(LUMA))
    valid = dict.fromkeys(MODALITIES, maps["mask"])
    valid["irradiance"] = maps["mask"] & (luma > BLACK)
    rows = []
    for name in MODALITIES:
        value = maps[name].masked_fill(~valid[name], torch.nan)
        rel, gap = relation(value, pts, name), margin(value, pts, name)
        begin = int(torch.randint(2, (1,), generator=rng))                      # which answer comes first
        if name == "albedo":
            sides = [(rel > 0).nonzero()[:, 0].tolist(), (rel < 0).nonzero()[:, 0].tolist()]
            chosen = [k for i in range(n) for k in sides[(begin + i) % 2][i // 2:i // 2 + 1]]
        else:
            chosen = rel.nonzero()[:n, 0].tolist()
        for i, k in enumerate(chosen):
            pair, first, by = pts[k], bool(rel[k] > 0), float(gap[k])
            if name != "albedo" and first != ((begin + i) % 2 == 0):
                pair, first, by = pair.flip(0), not first, -by
            rows.append(dict(id=f"{scene}_{name}_{i}", scene=scene, modality=name, pts=pair.tolist(), first=first,
                             margin=by))
    return rows


def balance(rows, seed):
    """Drop albedo questions of the commoner answer, chosen by the seed, until both answers are equally many."""
    sides = {w: [r["id"] for r in rows if r["modality"] == "albedo" and r["first"] == w] for w in (True, False)}
    more = max(sides, key=lambda w: len(sides[w]))
    surplus = len(sides[more]) - len(sides[not more])
    order = torch.randperm(len(sides[more]), generator=generator(seed, 29))[:surplus].tolist()
    dropped = {sides[more][k] for k in order}
    return [r for r in rows if r["id"] not in dropped]


def build(folder, n, size, seed, split=None, grid=1):
    """Rows of all scenes of a folder (of one split), balanced, sorted by scene. raises as draw; ValueError: no row."""
    scenes = [s for s in pools.list_scenes(folder) if split in (None, split_of(s))]
    bar = tqdm(scenes, desc=f"{split or 'all'} questions", unit="scene", leave=False, disable=len(scenes) < 50)
    return balance([row for scene in bar for row in draw(folder, scene, n, size, seed, grid)], seed)


def cached(path, folder, n, size, seed, split, write, grid=1):
    """`build`, kept in a file: drawn once for all ranks and resumptions. `write` False: only read it."""
    key = [str(folder), n, size, seed, split, grid, len(pools.list_scenes(folder))]
    if Path(path).is_file():
        kept = read_json(path)
        if kept.get("key") == key:
            return kept["rows"]
    rows = build(folder, n, size, seed, split, grid)
    if write:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(key=key, rows=rows))
    return rows


def photo(row, folder, size):
    """The unmarked photo of a row, or the marked one of a JSONL file: (3, size, size)."""
    if "image" in row:
        rgb = photos.read_rgb(row["image"])
        return F.interpolate(rgb[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
    return photos.fit_square(photos.read_rgb(Path(folder, f"{row['scene']}_rgb.png")), size)


def marked(rows, folder, size):
    """Marked photos of rows: (N, 3, size, size) in [0, 1]."""
    out = []
    for row in rows:
        rgb = photo(row, folder, size)
        out.append(rgb if "image" in row else draw_markers(rgb[None], torch.tensor(row["pts"])[None, None])[0, 0])
    return torch.stack(out)


def export(rows, folder, out, size, name):
    """Write rows as the released JSONL layout: OUT/images/ID.png with markers, then OUT/<name>; returns its path.

    The list is written last and at once, so a run that was stopped leaves none.
    """
    out = Path(out)
    lines = []
    for row in tqdm(rows, desc=name, unit="photo", leave=False, disable=len(rows) < 200):
        picture = f"images/{row['id']}.png"
        pictures.save_png(out / picture, marked([row], folder, size)[0].numpy())
        m, (red, green) = MODALITIES[row["modality"]], row["pts"]
        answer = m.answers[0 if row["first"] else 1]
        lines.append(dict(
            id=row["id"], image=picture, width=size, height=size,
            conversations=[{"from": "human", "value": f"<image>\n{m.question}"}, {"from": "gpt", "value": answer}],
            metadata=dict(dataset=Path(folder).name, modality=row["modality"], question=m.question, answer=answer,
                          scene=row["scene"], red_xy=red[::-1], green_xy=green[::-1], margin=row["margin"])))
    part = out / f"{name}.{os.getpid()}.part"
    out.mkdir(parents=True, exist_ok=True)
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(part, out / name)
    return out / name


def read_jsonl(path):
    """Rows of a JSONL file in the released layout; pictures lie beside it.

    raises  FileNotFoundError; ValueError naming file and line: no JSON, a picture outside the folder, a question or an
            answer that is not the official wording
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"questions.py: no file {str(path)!r}; want a .jsonl file; check the path")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):            # a name may hold other line breaks
        where = f"questions.py: {str(path)!r} line {number}"
        if line.strip():
            with DamageGuard(where, "no sample", "id, image and two conversations", "edit the line"):
                rows.append(_row(decode_json(line, where), path.parent, number, where))
    if not rows:
        raise ValueError(f"questions.py: {str(path)!r} is empty; want one sample a line; export it again")
    return rows


def _row(entry, root, number, where):
    known = {m.question: (name, m.answers) for name, m in MODALITIES.items()}
    picture, (asked, said) = entry["image"], (c["value"] for c in entry["conversations"])
    place = path_inside(root, picture, f"{where}: image")
    name, answers = known.get(asked.removeprefix("<image>\n"), (None, ()))
    if name is None or said not in answers:
        refuse(where, repr(asked if name is None else said), "an official question and answer (relations.MODALITIES)",
               "edit the line")
    about, key = entry.get("metadata") or {}, str(entry.get("id", number))
    return dict(id=key, modality=name, first=said == answers[0], image=str(place), scene=str(about.get("scene", key)),
                margin=float(about.get("margin", math.nan)))


def epoch_order(n, epoch, seed):
    """Order of n rows in one pass, the same on every rank."""
    return torch.randperm(n, generator=generator(seed, 31, epoch)).tolist()


def batch_of(rows, step, batch, seed):
    """Rows of a step: passes follow each other without a gap."""
    n = len(rows)
    places = range(step * batch, (step + 1) * batch)
    orders = {e: epoch_order(n, e, seed) for e in {p // n for p in places}}
    return [rows[orders[p // n][p % n]] for p in places]
