"""A teacher's maps as a judge: a folder of what a stronger network, or a depth sensor, says of the photos.

files    NAME_MODALITY.npy, as predictor.py writes them: floats (C, H, W), in the encoding of relations.MODALITIES.
         A colour's NAME_albedo.png beside it is read instead: it is sRGB-encoded whatever the network's own space
         NAME_disparity.npy, larger is closer, stands for NAME_depth.npy and is turned round
hole     NaN, infinity, or 0 in all channels; in a map with negative numbers, and of one channel, 0 is a value
answer   p = (1 + tanh(margin / tau)) / 2, margin and tau of the modality table; NaN where a point lies in a hole, where
         there is no map, and where not asked
"""
import hashlib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import formats
from data.photos import EXTENSIONS, fit_square, photo_size, resize, resize_mode
from data.pictures import output_name
from kernels.pair_reward import soften
from relations import MODALITIES, NAMES, SAME_ALBEDO, margin
from runtime.files import is_twin, limit, refuse

SIZE = 512                        # px, side of the square photos at most
ASPECT = 0.02                     # by which the proportions of a map and its photo may differ: sides are rounded
WHOLE = 1 << 28                   # bytes of all maps up to which the digest reads all of them
BLOCK = 1 << 12                   # bytes that it reads of a map at three places, where they are more


class MapsJudge:
    """Answers from maps that lie in a folder, of photos found by name; see the module docstring.

    folder    searched recursively; sub/NAME_depth.npy is of the photo sub/NAME.jpg, as sub_NAME_depth.npy is
    .size     the shorter side of the first map, at most SIZE
    .squeeze  False: photos are cut to their centred square (`fit_square`), and so are the maps; True: resized whole
    raises    FileNotFoundError: no such folder, no map in it; Refusal: two maps of a photo, a first one that is damaged
    """

    grid = 1

    def __init__(self, folder):
        self.folder = Path(folder)
        self.maps = find_maps(folder)                                           # name -> modality -> file
        self.files = formats.Files(folder)
        self.squeeze = False
        self._siblings = {}                                                     # folder -> stem -> names of photos
        self._told = set()                                                      # what stderr has been told
        (m, file), *_ = self.maps[min(self.maps)].items()
        self.size = min(SIZE, *self._read(file, m).shape[1:])

    def digest(self):
        """Hex digest of tau and of the maps: names, sizes and all bytes; beyond WHOLE bytes, of three BLOCKs a map."""
        about = [(m, row.tau, row.rule) for m, row in MODALITIES.items()]
        h = hashlib.sha256(repr(("maps", about, SAME_ALBEDO, self.size)).encode())
        sizes = {f: self.files.size(f) for maps in self.maps.values() for f in maps.values()}
        whole = sum(sizes.values()) <= WHOLE
        for file in sorted(sizes):
            n = sizes[file]
            h.update(repr((file, n)).encode())
            with open(self.folder / file, "rb") as f:
                for place in (0,) if whole else (0, n // 2, max(0, n - BLOCK)):
                    f.seek(place)
                    h.update(f.read() if whole else f.read(BLOCK))
        return h.hexdigest()

    def ask(self, rgb, pts, names=None, modalities=None):
        """As judge.Judge.ask; of rgb only the size is looked at.

        names    photo paths: they find the maps, and where the file is there its sides are compared with the map's
        raises   ValueError: no names; Refusal: a map of other proportions than its photo, of other values, damaged;
                 two photos for one map
        """
        if names is None:
            raise ValueError("teacher.MapsJudge.ask: got no names; want the path of every photo")
        prob = torch.full((*pts.shape[:2], len(NAMES)), torch.nan)
        points = pts.cpu()
        for i, name in enumerate(names):
            for m, file in self._find(name).items():
                if modalities is None or m in modalities:
                    found = self._fit(self._read(file, m), m, file, name, rgb.shape[-1])
                    prob[i, :, NAMES.index(m)] = probability(found, points[i], m)
        return prob.to(rgb.device)

    def _find(self, name):
        """Maps of a photo: modality -> file; {} where there are none, which is said.

        The photo a/b.jpg has the name that predictor.py gives it, a_b, or that it has in its own folder, b. A second
        photo of one folder and stem, a/b.png, is a_b_png.
        """
        path = Path(name)
        beside = self._photos_beside(path)
        for i in range(len(path.parts)):
            made = {}
            for photo in beside:
                made[output_name(Path(*path.parts[i:-1], photo), made)] = photo
            known = made.keys() & self.maps.keys()
            if known and len(known) < len(made):
                refuse(f"{self.folder}: {str(path.parent)!r}", f"photos {', '.join(beside)} and maps of {min(known)!r}",
                       "maps of each", "rename one, or write the maps with predictor.py")
            for key in known:
                if made[key] == path.name:
                    return self.maps[key]
        self._tell(f"{str(path)!r}: got no map in {str(self.folder)!r}, want {path.stem}_depth.npy, ...; not known")
        return {}

    def _photos_beside(self, path):
        """Sorted names of the photos in a photo's folder that differ from it in the ending alone, itself among them."""
        folder = str(path.parent)
        if folder not in self._siblings:
            stems = {}
            for other in map(Path, os.listdir(folder) if os.path.isdir(folder) else ()):
                if other.suffix.lower() in EXTENSIONS:
                    stems.setdefault(other.stem, set()).add(other.name)
            self._siblings[folder] = stems
        return sorted({path.name} | self._siblings[folder].get(path.stem, set()))

    def _read(self, file, modality):
        """A map as the modality table encodes it, NaN in holes: (C, H, W) float32."""
        row = MODALITIES[modality]
        where = self.files.where(file)
        x = torch.from_numpy(formats.read_map(self.files, file, row.channels)).float()
        if x[0].numel() > limit["pixels"]:
            refuse(where, f"{x[0].numel()} pixels", f"at most {limit['pixels']}", "resize it, or raise --max-pixels")
        zero_is_value = row.channels == 1 and bool((x < 0).any())
        hole = ~x.isfinite().all(0) | (not zero_is_value) & (x == 0).all(0)     # (H, W)
        known = x[:, ~hole][:, ::16]                                            # (C, n): enough to see what it is
        if known.numel() and row.kind == "vector" and not 0.9 < known.norm(dim=0).median() < 1.1:
            refuse(where, "vectors that are not of length 1", row.encoding, "save them as they are, not as a picture")
        if known.numel() and row.kind in ("colour", "scalar") and not (-0.01 <= known.min() and known.max() <= 1.01):
            refuse(where, f"values {known.min():g}..{known.max():g}", row.encoding, "save it again")
        if not known.numel():
            self._tell(f"{where}: got no number but 0, NaN and infinity, want a map; not known")
        return (-x if file.endswith("_disparity.npy") else x).masked_fill(hole, torch.nan)

    def _fit(self, x, modality, file, name, size):
        """A map (C, H, W) cut as its photo was: (C, size, size). raises Refusal: other proportions than the photo's."""
        if os.path.isfile(name):
            H, W = photo_size(name)
            h, w = x.shape[1:]
            if abs(h * W / (w * H) - 1) > ASPECT:
                refuse(self.files.where(file), f"{w} x {h} pixels of a photo of {W} x {H} ({str(name)!r})",
                       "the same proportions", "resize the map to the photo")
        mode = resize_mode(MODALITIES[modality].kind)
        return resize(x, size, size, mode) if self.squeeze else fit_square(x, size, mode)

    def _tell(self, text):
        """Say something on stderr, once."""
        if text not in self._told:
            self._told.add(text)
            tqdm.write(f"maps: {text}", file=sys.stderr)


def probability(maps, pts, modality):
    """Probability of the first answer from a map (C, H, W) at pairs (P, 2, 2): (P,), NaN where it has no value."""
    by = margin(maps, pts, modality)
    return ((1 + soften(by, MODALITIES[modality].tau)) / 2).where(by.isfinite(), torch.nan)


def find_maps(folder):
    """Files of maps under a folder: dict name -> modality -> path relative to it.

    raises   FileNotFoundError: no such folder, no map in it; Refusal: two files for one map
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"maps: no folder {str(folder)!r}; want one as predictor.py writes it; check the path")
    endings = {f"_{m}.npy": m for m in NAMES} | {"_disparity.npy": "depth"}
    pictures = {f"_{m}.png": m for m, row in MODALITIES.items() if row.kind == "colour"}
    found = {}
    for root, dirs, files in os.walk(folder):
        dirs.sort()
        for file in (f for f in sorted(files) if not is_twin(f)):                # X.npy comes before X.png
            ending = next((e for e in (*endings, *pictures) if file.endswith(e)), None)
            if ending is None:
                continue
            place = Path(root, file).relative_to(folder)
            maps = found.setdefault("_".join((*place.parts[:-1], file.removesuffix(ending))), {})
            m = (endings | pictures)[ending]
            if m in maps and Path(maps[m]).with_suffix(".png") != place:
                refuse(folder, f"{maps[m]} and {place}", "one map of a photo and modality", "remove one")
            maps[m] = str(place)
    if not found:
        raise FileNotFoundError(f"maps: no map in {str(folder)!r}; want NAME_depth.npy, ... as predictor.py writes "
                                "them; check the folder")
    return found
