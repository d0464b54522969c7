"""Pools of scenes with true maps: folders in HyperSim's style, and procedural scenes kept in memory.

sample    rgb (3, H, W) float32, sRGB-encoded in [0, 1]; every modality (C, H, W) as in relations.MODALITIES, vectors 0
          where invalid; mask (1, H, W) bool, True = valid
"""
import functools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import scenes
from data.photos import fit_square, open_image, resize_mode
from data.pictures import row_of
from kernels import send
from relations import MODALITIES
from runtime.files import find_files

MAPS = ("rgb", *MODALITIES)


def list_scenes(folder):
    """Sorted scene ids of a HyperSim-style folder (ID_rgb.png, ...): every id that has at least one map."""
    folder = Path(folder)
    ids = {p.name[:-len(f"_{m}.png")] for m in MAPS for p in find_files(folder, f"*_{m}.png")}
    if not ids:
        got = "no scene in" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"pools.py: {got} {str(folder)!r}; want ID_rgb.png, ...; check the path")
    return sorted(ids)


def _read_map(folder, scene, name):
    """One map of a scene -> (C, H, W) float32 in [0, 1], as stored."""
    path = Path(folder, f"{scene}_{name}.png")
    if not path.is_file():
        raise FileNotFoundError(f"pools.py: no {path.name} beside the maps of {scene} in {str(folder)!r}; "
                                "want one file per modality (docs/files.md)")
    image = open_image(path)
    is_gray = row_of(name).channels == 1
    modes = ("L", "I;16", "I") if is_gray else ("RGB",)
    if image.mode not in modes or (not is_gray and image.info["wide"]):
        got = "16-bit RGB (Pillow would cut it to 8)" if image.mode in modes else f"mode {image.mode}"
        raise ValueError(f"pools.py: {str(path)!r} got {got}, want "
                         f"{'8- or 16-bit gray' if is_gray else '8-bit RGB'}; convert it")
    pixels = np.asarray(image).astype(np.float32) / (65535 if image.mode.startswith("I") else 255)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def read_scene(folder, scene, size=None):
    """Read one HyperSim-style scene (the released judge's layout) as a sample dict.

    size     None = as stored; else centred square crop, antialiased; but depth, vectors and mask nearest, so that no
             depth is averaged across an edge
    returns  rgb, all modalities, mask. depth is stored value / range, in [0, 1], affine per image; vectors are
             renormalised. mask is False where the stored normal is zero (0, 0, 0 or mid-gray): there depth reads as
             closest, and normal is set to the zero vector
    raises   FileNotFoundError for a missing map; ValueError for another mode or different sizes
    """
    maps = {m: _read_map(folder, scene, m) for m in MAPS}
    H, W = maps["rgb"].shape[1:]
    for m, x in maps.items():
        if x.shape[1:] != (H, W):
            raise ValueError(f"pools.py: {scene}_{m}.png in {str(folder)!r} got {x.shape[2]} x {x.shape[1]} "
                             f"pixels, want {W} x {H} as {scene}_rgb.png; export all maps at one size")
    there = {}
    for m in (m for m, row in MODALITIES.items() if row.kind == "vector"):
        maps[m], there[m] = _unit_vectors(maps[m])
    maps["mask"] = there["normal"]
    if size is not None:
        maps = {m: fit_square(x, size, "nearest" if m == "mask" else resize_mode(row_of(m).kind))
                for m, x in maps.items()}
    return maps


def _unit_vectors(stored):
    """Stored (n + 1) / 2 -> unit vectors (3, H, W), 0 where nothing is stored, and where something is (1, H, W)."""
    n = 2 * stored - 1
    length = n.norm(dim=0, keepdim=True)                                          # (1, H, W)
    there = stored.any(0, keepdim=True) & (length > 0.05)           # mid-gray (127, 128) decodes to < .01
    return torch.where(there, n / length.clamp_min(0.05), 0.0), there


def read_scene_folder(folder, size=None):
    """Yield (id, sample) for every scene of a folder, sorted by id; see list_scenes and read_scene."""
    for scene in list_scenes(folder):
        yield scene, read_scene(folder, scene, size)


def scene_batch(folder, size):
    """All scenes of a HyperSim-style folder at one size, stacked: dict of (n, C, size, size)."""
    samples = [sample for _, sample in read_scene_folder(folder, size)]
    return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


class ScenePool:
    """Procedural scenes in memory, rendered once: about 27 bytes per pixel and scene (float16 maps).

    domain, split  of scenes.py;  n scenes from the start of the split;  size px;  keys: which maps are kept
    device         where they are rendered, and kept if that is a GPU with room: at most ROOM of its free memory
    .maps          dict of (n, C, H, W) float16 tensors, mask bool
    """

    ROOM = 0.4
    KEYS = (*MAPS, "mask")

    def __init__(self, domain, split, n, size, keys=KEYS, device="cpu"):
        device = torch.device(device)
        self.maps = {}
        chunk = max(1, (512 * 32 * 32 if device.type == "cpu" else scenes.CHUNK["cuda"]) // size**2)
        for i in tqdm(range(0, n, chunk), desc=f"{domain} scenes", leave=False, disable=n <= 1000):
            maps = scenes.render_scenes(domain, scenes.scene_ids(split, min(chunk, n - i), i).to(device), size)
            maps = {k: maps[k] if k == "mask" else maps[k].half() for k in keys}
            if i == 0:
                home = self._home(n * sum(v[0].nbytes for v in maps.values()), device)
                self.maps = {k: v.new_empty(n, *v.shape[1:], device=home) for k, v in maps.items()}
            for k, v in maps.items():
                self.maps[k][i:i + len(v)].copy_(v)

    def _home(self, size, device):
        """Where maps of `size` bytes are kept."""
        if device.type == "cpu":
            return device
        torch.cuda.empty_cache()                                                  # of earlier stages of the run
        return device if size <= self.ROOM * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")

    def __len__(self):
        return len(next(iter(self.maps.values())))

    def pick(self, index, device="cpu"):
        """Maps of the scenes `index` (B,) as float32 on a device: dict of (B, C, H, W)."""
        if torch.is_tensor(index):
            index = send(index, next(iter(self.maps.values())).device)
        device = torch.device(device)
        found = {k: v[index] if v.is_cuda or device.type == "cpu" else send(v[index], device)
                 for k, v in self.maps.items()}
        return {k: v.to(device, torch.bool if v.dtype == torch.bool else torch.float32) for k, v in found.items()}

    def draw(self, draw, device="cpu"):
        """This rank's scenes of a batch: their maps, as `pick`, and their names. draw: ranks.Draw of the step."""
        index = draw.integers(len(self), (draw.batch,))
        return self.pick(index, device), [f"scene {i}" for i in index.tolist()]

    def all(self):
        """Maps of every scene, float32 on the CPU."""
        return self.pick(slice(None))


@functools.lru_cache(maxsize=6)
def scene_pool(*args, **kwargs):
    """ScenePool of the same arguments, rendered once per process."""
    return ScenePool(*args, **kwargs)
