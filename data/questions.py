"""Questions with true answers from scene folders: a judge is tuned on them and measured with them.

row         dict: id, scene, modality, pts [[row, col], [row, col]] red first in pixels of the tile, first (True: the
            first answer is right), margin (relations.margin). A photo with drawn markers has image (a path), no pts
randomness  a scene's questions depend on the seed and its id, not on the other scenes of the folder
balance     red and green are right equally often, by swapping the colours; so are yes and no over all rows of a yes/no
            question, by dropping the surplus
no answer   in dead zones, at invalid pixels, and where nothing is seen (Modality.seen_on): black albedo shows no light
split       by room, never by question: the room is a scene id up to its first "."
files       JSON lines as InternVL's trainer and the judge release read them: id, image, width, height, conversations
"""
import hashlib
import math
from pathlib import Path

import torch
from tqdm import tqdm

from data import photos
from data.pictures import save_png
from data.pools import list_scenes, read_scene
from relations import LUMA, MODALITIES, RULES, draw_markers, harden, margin, relation, sample_pairs
from runtime.config import UserError
from runtime.files import DamageGuard, decode_json, path_inside, read_json, refuse, write_json, write_rows
from runtime.ranks import barrier, generator, rank, world

BLACK = 0.1                       # encoded luma (1 % linear); what is darker shows nothing that is seen on it
PART = 32                         # scenes of a file of training questions: some seconds of drawing
PER_SCENE = 2                     # training questions per scene and modality, one of each answer (judge release: 1)
CANDIDATES = 24                   # pairs that are drawn for each question that is wanted
SHARE = 0.1                       # of the rooms, for validation
JSONL = {"train": "intrinsic_judgement_train.jsonl", "val": "intrinsic_judgement_val.jsonl"}


def true_relations(maps, pts):
    """Relations of all modalities from ground truth: (B, P, M) int8; 0 where a point, inside the maps, is invalid."""
    nan = {m: maps[m].masked_fill(~maps["mask"], torch.nan) for m in MODALITIES}
    return torch.stack([harden(RULES[row.rule](nan[m], pts, 0), row) for m, row in MODALITIES.items()], -1)


def split_of(scene):
    """"train" or "val", from a hash of the scene's room: the same on every machine; SHARE of all rooms is "val"."""
    room = scene.split(".")[0]
    return "val" if int(hashlib.sha256(room.encode()).hexdigest()[:8], 16) < SHARE * 2**32 else "train"


def draw_questions(folder, scene, n, size, seed, grid=1):
    """Up to n questions per modality about one scene, drawn at `size` px: list of rows.

    raises  ValueError: normals zero everywhere, constant depth; as pools.read_scene
    """
    maps = read_scene(folder, scene, size)
    _check_maps(maps, f"questions.py: {scene}_%s.png in {str(folder)!r}")
    rng = generator(seed, int(hashlib.sha256(scene.encode()).hexdigest()[:15], 16))
    pts = sample_pairs(1, (size, size), CANDIDATES * n, rng, mask=maps["mask"][None], grid=grid)[0]   # (K, 2, 2)
    rows = []
    for name, row in MODALITIES.items():
        valid = maps["mask"]
        if row.seen_on:
            valid = valid & (torch.einsum("chw,c->hw", maps[row.seen_on], torch.tensor(LUMA)) > BLACK)
        value = maps[name].masked_fill(~valid, torch.nan)
        begin = int(torch.randint(2, (1,), generator=rng))                      # which answer comes first
        chosen = _choose(relation(value, pts, name), margin(value, pts, name), pts, n, begin, swaps=not row.yes_no)
        rows += [dict(id=f"{scene}_{name}_{i}", scene=scene, modality=name, pts=pair.tolist(), first=first, margin=by)
                 for i, (pair, first, by) in enumerate(chosen)]
    return rows


def _check_maps(maps, where):
    if not maps["mask"].any():
        raise ValueError(f"{where % 'normal'}: got all-zero normals, want (n + 1) / 2; they mark every pixel invalid")
    depth = maps["depth"][maps["mask"]]
    if depth.min() == depth.max():
        raise ValueError(f"{where % 'depth'}: got one depth ({depth[0]:.4f}) everywhere, want near and far; export it "
                         "again")


def _choose(rel, gap, pts, n, begin, swaps):
    """Up to n of K pairs, such that the right answer alternates: list of (pair (2, 2), first, margin) as in a row.

    rel, gap  (K,) relation and margin;  pts  (K, 2, 2);  begin  0: the first answer is right in the first pair
    swaps     True: swapping the colours swaps the answers. False: pairs of both answers are looked for
    """
    if swaps:
        places = rel.nonzero()[:n, 0].tolist()
    else:
        sides = [(rel > 0).nonzero()[:, 0].tolist(), (rel < 0).nonzero()[:, 0].tolist()]
        places = [k for i in range(n) for k in sides[(begin + i) % 2][i // 2:i // 2 + 1]]
    chosen = []
    for i, k in enumerate(places):
        first = bool(rel[k] > 0)
        if swaps and first != ((begin + i) % 2 == 0):
            chosen.append((pts[k].flip(0), not first, -float(gap[k])))
        else:
            chosen.append((pts[k], first, float(gap[k])))
    return chosen


def balance(rows, seed):
    """Drop yes/no questions of the more frequent answer, chosen by the seed, until both are equally frequent."""
    dropped = set()
    for m in (m for m, row in MODALITIES.items() if row.yes_no):
        sides = {w: [r["id"] for r in rows if r["modality"] == m and r["first"] == w] for w in (True, False)}
        more = max(sides, key=lambda w: len(sides[w]))
        surplus = len(sides[more]) - len(sides[not more])
        order = torch.randperm(len(sides[more]), generator=generator(seed, 29))[:surplus].tolist()
        dropped |= {sides[more][k] for k in order}
    return [r for r in rows if r["id"] not in dropped]


def build_questions(folder, n, size, seed, split=None, grid=1):
    """Rows of all scenes of a folder (of one split), balanced, sorted by scene. raises as draw_questions."""
    scenes = [s for s in list_scenes(folder) if split in (None, split_of(s))]
    bar = tqdm(scenes, desc=f"{split or 'all'} questions", unit="scene", leave=False, disable=len(scenes) < 50)
    return balance([row for scene in bar for row in draw_questions(folder, scene, n, size, seed, grid)], seed)


def load_questions(path, folder, scenes, n, size, seed, grid=1):
    """Rows of some scenes of a folder, not balanced: read from the file `path`, or drawn and written to it.

    raises  as draw_questions; Refusal: the file holds no such rows
    """
    key = [str(folder), scenes, n, size, seed, grid]
    if Path(path).is_file():
        kept = read_json(path)
        if kept.get("key") == key:
            return _check_rows(kept.get("rows"), folder, size, path)
    rows = [row for scene in scenes for row in draw_questions(folder, scene, n, size, seed, grid)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(key=key, rows=rows))
    return rows


def _check_rows(rows, folder, size, path):
    """Rows as they were read from a file. raises Refusal: one is not as the module docstring says."""
    with DamageGuard(path, "no questions", "rows with id, scene, modality, pts, first, margin", "remove it"):
        for row in rows:
            pts = row["pts"]
            inside = [type(x) is int and 0 <= x < size for point in pts for x in point]
            good = ([len(point) for point in pts] == [2, 2] and all(inside) and row["modality"] in MODALITIES
                    and isinstance(row["id"], str) and type(row["first"]) is bool
                    and isinstance(row["margin"], (int, float)) and math.isfinite(row["margin"]))
            path_inside(folder, f"{row['scene']}_rgb.png", path)
            if not good or not isinstance(row["scene"], str) or "image" in row:
                raise ValueError(f"other values in {str(row)[:80]}")
    return rows


def photo_path(row, folder):
    """The unmarked photo of a row's scene."""
    return Path(folder, f"{row['scene']}_rgb.png")


def read_photo(row, folder, size):
    """The unmarked photo of a row, or the marked one of a JSONL file: (3, size, size)."""
    if "image" in row:
        rgb = photos.read_rgb(row["image"])
        return photos.resize(rgb, size, size)
    return photos.fit_square(photos.read_rgb(photo_path(row, folder)), size)


def marked_photos(rows, folder, size):
    """Marked photos of rows: (N, 3, size, size) in [0, 1]."""
    out = []
    for row in rows:
        rgb = read_photo(row, folder, size)
        out.append(rgb if "image" in row else draw_markers(rgb[None], torch.tensor(row["pts"])[None, None])[0, 0])
    return torch.stack(out)


def write_jsonl(rows, folder, out, size, name):
    """Write rows in the released JSONL layout: OUT/images/ID.png with markers, then OUT/<name>; returns its path.

    The list is written last and atomically: a run that was stopped leaves pictures but no list. raises OSError
    """
    out = Path(out)
    lines = []
    for row in tqdm(rows, desc=name, unit="photo", leave=False, disable=len(rows) < 200):
        picture = f"images/{row['id']}.png"
        save_png(out / picture, marked_photos([row], folder, size)[0].numpy())
        m = MODALITIES[row["modality"]]
        red, green = row["pts"]
        answer = m.answers[0 if row["first"] else 1]
        lines.append(dict(
            id=row["id"], image=picture, width=size, height=size,
            conversations=[{"from": "human", "value": f"<image>\n{m.question}"}, {"from": "gpt", "value": answer}],
            metadata=dict(dataset=Path(folder).name, modality=row["modality"], question=m.question, answer=answer,
                          scene=row["scene"], red_xy=red[::-1], green_xy=green[::-1], margin=row["margin"])))
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / name, lines)
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
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):            # splitlines would also split at \r
        where = f"questions.py: {str(path)!r} line {number}"
        if line.strip():
            with DamageGuard(where, "no sample", "id, image and two conversations", "edit the line"):
                rows.append(_row(decode_json(line, where), path.parent, number, where))
    if not rows:
        raise ValueError(f"questions.py: {str(path)!r} is empty; want one sample a line; export it again")
    return rows


def _row(entry, root, number, where):
    known = {m.question: (name, m.answers) for name, m in MODALITIES.items()}
    asked, said = (c["value"] for c in entry["conversations"])
    place = path_inside(root, entry["image"], f"{where}: image")
    name, answers = known.get(asked.removeprefix("<image>\n"), (None, ()))
    if name is None or said not in answers:
        refuse(where, repr(asked if name is None else said), "an official question and answer (relations.MODALITIES)",
               "edit the line")
    about = entry.get("metadata") or {}
    key = str(entry.get("id", number))
    return dict(id=key, modality=name, first=said == answers[0], image=str(place), scene=str(about.get("scene", key)),
                margin=float(about.get("margin", math.nan)))


def epoch_order(n, epoch, seed):
    """Order of n rows in one pass, the same on every rank."""
    return torch.randperm(n, generator=generator(seed, 31, epoch)).tolist()


def batch_of(rows, step, batch, seed):
    """Rows of a step. A pass over all rows ends where the next begins, which may be within a batch."""
    n = len(rows)
    places = range(step * batch, (step + 1) * batch)
    orders = {e: epoch_order(n, e, seed) for e in {p // n for p in places}}
    return [rows[orders[p // n][p % n]] for p in places]


def training_questions(cfg, grid):
    """Training questions of --scenes: the rows of a .jsonl file, or drawn and kept in OUT/judge/questions.

    Each rank draws its share of the parts, which do not depend on the number of ranks; a stopped run draws the rest.
    raises  UserError: no question
    """
    if cfg.scenes.endswith(".jsonl"):
        return read_jsonl(cfg.scenes)
    scenes = [s for s in list_scenes(cfg.scenes) if split_of(s) == "train"]
    parts = [scenes[i:i + PART] for i in range(0, len(scenes), PART)]

    def load(i):
        return load_questions(Path(cfg.out, "judge", "questions", f"{i:05}.json"), cfg.scenes, parts[i], PER_SCENE,
                              cfg.size, cfg.seed, grid)

    own = range(rank(), len(parts), world())
    for i in tqdm(own, desc="questions", unit=f"{PART} scenes", leave=False, disable=rank() > 0 or len(parts) < 4):
        load(i)
    barrier()                                                                   # all parts are on the disk
    rows = balance([row for i in range(len(parts)) for row in load(i)], cfg.seed)
    if not rows:
        raise UserError(f"train.py: {cfg.scenes} gives no training question; want more scenes (a tenth is held out)")
    return rows
