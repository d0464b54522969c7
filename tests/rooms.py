"""Small scenes on disk in the layout of data/prepare.py, whose right answers are known: left is near, dim and so on."""
import numpy as np
from PIL import Image

S = 64


def png(path, array):
    """Write a picture."""
    Image.fromarray(array).save(path)


def write_scene(folder, scene, seed=0, **maps):
    """A scene: left near and dim, right far and bright; patches of two colours; a hole at the top."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    depth = np.tile(np.linspace(0, 40000, S).astype(np.uint16), (S, 1))
    normal = np.tile(np.linspace(-.9, .9, S)[:, None, None], (1, S, 3))
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True).clip(1e-6) * .8 + np.array([0, 0, .6])
    colour = rng.integers(60, 255, (2, 3)).astype(np.uint8)
    albedo = colour[(np.indices((S, S)).sum(0) // 16) % 2]
    light = np.repeat(np.tile(np.linspace(20, 250, S).astype(np.uint8), (S, 1))[..., None], 3, -1)
    normal = np.round((normal / np.linalg.norm(normal, axis=-1, keepdims=True) + 1) / 2 * 255).astype(np.uint8)
    normal[:8], depth[:8] = 0, 0                                                # invalid: depth reads as closest
    made = dict(rgb=albedo, depth=depth, normal=normal, albedo=albedo, irradiance=light) | maps
    for name, value in made.items():
        png(folder / f"{scene}_{name}.png", value)
