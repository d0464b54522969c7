"""Raw downloads to scene folders, and scene folders to the judge release's training files.

    python -m data.prepare hypersim RAW OUT --cameras metadata_camera_parameters.csv
    python -m data.prepare interiorverse RAW OUT
    python -m data.prepare jsonl SCENES OUT

HyperSim       ai_VVV_NNN/images/scene_cam_XX_{final,geometry}_hdf5; depth_meters is the distance to the camera, so
               z = distance * |ray_z| / |ray|; rays are the scene's own, M_cam_from_uv (u, v, 1), with tilt and shift
InteriorVerse  SCENE/000_{im,albedo,depth,normal,mask}.exr; depth in mm along z; irradiance = image / albedo
written        ID_{rgb,depth,normal,albedo,irradiance}.png, the centred square at --size px; ID is ROOM.CAMERA.FRAME
               depth 16 bit, 1..65535 over the 1 % to 99 % quantiles, 0 where invalid; normals (n + 1) / 2, toward the
               camera, 0, 0, 0 where invalid; albedo, irradiance (over its 98 % quantile) and rgb sRGB-encoded
"""
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import formats, questions
from data.photos import fit_square
from data.pictures import save_png
from data.pools import MAPS
from relations import LUMA, srgb_encode
from runtime.command import run_command
from runtime.config import UserError
from runtime.files import DamageGuard, find_files, limit, refuse, replace_files
from runtime.flags import Parser

FRAME = {"color": "final", "diffuse_reflectance": "final", "diffuse_illumination": "final", "depth_meters": "geometry",
         "normal_cam": "geometry"}
COLOURS = ("color", "diffuse_reflectance", "diffuse_illumination")
MATRIX = [[f"M_cam_from_uv_{i}{j}" for j in range(3)] for i in range(3)]        # columns of a camera's matrix
ENOUGH = 0.1                      # share of a frame's pixels; with fewer valid ones it is of no use
BRIGHT = 0.8                      # encoded brightness that the 90 % quantile of a HyperSim image is given
DIM = 0.01                        # linear albedo; below it image / albedo is too noisy to be an irradiance
BETTER = 0.05                     # a choice of normal axes is wrong when another one has a mean |cosine| so much higher


def read_hdf5(path):
    """The one array of a HyperSim file. raises FileNotFoundError, ValueError; UserError without h5py."""
    try:
        import h5py
    except ImportError:
        raise UserError("data.prepare: HyperSim is stored as HDF5 and h5py is not installed; "
                        "pip install h5py") from None
    if not path.is_file():
        raise FileNotFoundError(f"data.prepare: no {path.name} in {str(path.parent)!r}; fetch that folder again")
    where = f"data.prepare: {str(path)!r}"
    with DamageGuard(where, "an HDF5 file that cannot be read", "a whole one"), h5py.File(path, "r") as f:
        found = f["dataset"]
        if not isinstance(f.get("dataset", getlink=True), h5py.HardLink) or found.is_virtual or found.external:
            refuse(where, "an array that lies in another file", "one in its own")
        if found.size > 4 * limit["pixels"]:
            refuse(where, f"an array {found.shape}", f"at most {limit['pixels']} pixels", "raise --max-pixels")
        return np.asarray(found, np.float32)


def read_cameras(path):
    """metadata_camera_parameters.csv -> dict scene -> M_cam_from_uv (3, 3). raises FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.prepare: no {str(path)!r}; want metadata_camera_parameters.csv of "
                                "apple/ml-hypersim (contrib/mikeroberts3000); name it with --cameras")
    where = f"data.prepare: {str(path)!r}"
    head, *rows = formats.decode_table(Path(path).read_bytes(), where, ",") or [[]]
    lacking = [name for name in ("scene_name", *itertools.chain(*MATRIX)) if name not in head]
    if lacking:
        refuse(where, f"no column {lacking[0]!r}", "scene_name, M_cam_from_uv_00 .. 22")
    cameras = {}
    for number, row in enumerate(rows, 2):
        row = dict(zip(head, row, strict=False))
        try:
            cameras[row["scene_name"]] = np.array([[float(row.get(name) or "nan") for name in names]
                                                   for names in MATRIX])
        except ValueError as error:
            refuse(f"{where} row {number}", f"no number ({error})", "numbers with a decimal point")
    return cameras


def uv_rays(camera, H, W):
    """Rays through the pixel centres, camera frame (x right, y up, z toward the camera): (H, W, 3), not normalised."""
    u = (2 * np.arange(W) + 1) / W - 1
    v = 1 - (2 * np.arange(H) + 1) / H
    uv = np.stack([*np.meshgrid(u, v), np.ones((H, W))], -1)                    # (H, W, 3)
    return uv @ camera.T


def fov_rays(degrees, H, W):
    """Rays of a plain camera with a horizontal field of view, as `uv_rays`."""
    half = math.tan(math.radians(degrees) / 2)
    return uv_rays(np.diag([half, half * H / W, -1.0]), H, W)


def face_camera(normal, rays):
    """Unit normals that all point to the camera's side: those that point away are negated. (H, W, 3) x2."""
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = normal / np.where(length > 0, length, 1)
    return np.where((normal * rays).sum(-1, keepdims=True) > 0, -normal, normal)


def check_axes(normal, points, valid, where):
    """Refuse normals with mirrored axes, by comparing them with the normals of the surface through `points` (H, W, 3).

    raises  ValueError naming the signs of x, y, z that fit better
    """
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    own = np.cross(across, down)
    size = np.linalg.norm(own, axis=-1)
    ok = valid[1:-1, 1:-1] & valid[1:-1, 2:] & valid[1:-1, :-2] & valid[2:, 1:-1] & valid[:-2, 1:-1] & (size > 0)
    if not ok.any():
        return
    own = (own / np.where(size > 0, size, 1)[..., None])[ok]                    # (n, 3) of the surface
    given = normal[1:-1, 1:-1][ok]                                              # (n, 3) of the file
    signs = [s for s in itertools.product((1, -1), repeat=3) if s[2] == 1]      # |cosine| cannot tell s from -s
    fit = [float(np.abs((given * s * own).sum(-1)).mean()) for s in signs]
    best = int(np.argmax(fit))
    if fit[best] > fit[0] + BETTER:
        raise ValueError(f"{where}: got normals that fit the depth better with signs {signs[best]} of x, y, z "
                         f"({fit[best]:.2f} against {fit[0]:.2f}); want x right, y up, z toward the camera; "
                         "check the download")


def depth_levels(depth, valid, where):
    """Planar depth -> uint16: 1..65535 between the 1 % and 99 % quantiles, 0 where invalid. raises ValueError."""
    low, high = np.quantile(depth[valid], [0.01, 0.99])
    if not high > low:
        raise ValueError(f"{where}: got one depth ({low:.4f}) everywhere, want near and far; the frame is of no use")
    scaled = (np.where(valid, depth, low) - low) / (high - low)
    return np.where(valid, 1 + np.round(scaled.clip(0, 1) * 65534), 0).astype(np.uint16)


def encode_colour(linear):
    """(H, W, 3) linear -> (3, H, W) torch, sRGB-encoded, clipped to [0, 1]."""
    clean = np.where(np.isfinite(linear), linear, 0).clip(0, 1).astype(np.float32)
    return srgb_encode(torch.from_numpy(clean)).permute(2, 0, 1)


def write_frame(out, name, size, rgb, z, normal, albedo, irradiance, valid, where):
    """Write one scene of the layout: all maps of it or none.

    rgb, albedo, irradiance (3, H, W) encoded; z (H, W) planar; normal (H, W, 3); valid (H, W) bool
    raises  ValueError: less than ENOUGH valid, constant depth or irradiance
    """
    if not valid.mean() >= ENOUGH:
        raise ValueError(f"{where}: got {100 * valid.mean():.1f} % valid pixels, want {100 * ENOUGH:.0f}; the frame is "
                         "of no use")
    light = irradiance[:, torch.from_numpy(valid)]
    if bool((light == light[:, :1]).all()):
        raise ValueError(f"{where}: got one irradiance everywhere, want lit and shaded; the frame is of no use")
    depth = _fit_nearest(depth_levels(z, valid, where)[None].astype(np.int32), size)[0].astype(np.uint16)
    shown = np.where(valid[..., None], np.round((normal + 1) * 127.5), 0).astype(np.uint8)
    shown = _fit_nearest(shown.transpose(2, 0, 1), size).transpose(1, 2, 0).copy()
    pictures = dict(rgb=fit_square(rgb, size).numpy(), albedo=fit_square(albedo, size).numpy(),
                    irradiance=fit_square(irradiance, size).numpy(), depth=Image.fromarray(depth),
                    normal=Image.fromarray(shown))

    def write(folder):
        for m, picture in pictures.items():
            save_png(folder / f"{name}_{m}.png", picture)
    replace_files(out, write, last=f"{name}_rgb.png", part=f"{name}.part")     # other commands may write to `out` too


def _fit_nearest(x, size):
    """(C, H, W) array of measured values -> (C, size, size): `fit_square`, nearest."""
    return fit_square(torch.from_numpy(np.ascontiguousarray(x)), size, "nearest").numpy()


def convert_hypersim(scene, camera, frame, cameras, out, size):
    """Convert one HyperSim frame. scene: its folder ai_VVV_NNN; camera cam_XX; frame IIII.

    raises  FileNotFoundError, ValueError; UserError without h5py
    """
    where = f"data.prepare: {scene.name} {camera} frame {frame}"
    maps = {m: read_hdf5(scene / "images" / f"scene_{camera}_{part}_hdf5" / f"frame.{frame}.{m}.hdf5")
            for m, part in FRAME.items()}
    if scene.name not in cameras or not np.isfinite(cameras[scene.name]).all():
        raise ValueError(f"{where}: got no camera for {scene.name!r} in --cameras; want one row a scene")
    H, W = maps["depth_meters"].shape
    for m, x in maps.items():
        if x.shape[:2] != (H, W):
            raise ValueError(f"{where}: got {m} of {x.shape[1]} x {x.shape[0]} px, want {W} x {H} as depth_meters")
    rays = uv_rays(cameras[scene.name], H, W)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    distance = maps["depth_meters"]
    normal = maps["normal_cam"]
    length = np.linalg.norm(normal, axis=-1)
    valid = (np.isfinite(distance) & (distance > 0) & np.isfinite(length) & (length > 0.5)
             & np.logical_and.reduce([np.isfinite(maps[m]).all(-1) for m in COLOURS]))
    distance = np.where(valid, distance, 0)
    normal = np.where(valid[..., None], normal, 0)
    check_axes(normal, distance[..., None] * rays, valid, where)
    colour, light = (np.where(valid[..., None], maps[m], 0) for m in ("color", "diffuse_illumination"))
    bright = np.quantile((colour @ np.array(LUMA))[valid], 0.9) if valid.any() else 0
    if not bright > 0:
        raise ValueError(f"{where}: got a black image; the frame is of no use")
    target = ((BRIGHT + 0.055) / 1.055) ** 2.4                                  # linear value of the wanted brightness
    top = np.quantile(light.max(-1)[valid], 0.98)
    write_frame(out, f"{scene.name}.{camera}.{frame}", size, encode_colour(colour * target / bright),
                distance * np.abs(rays[..., 2]), face_camera(normal, rays),
                encode_colour(maps["diffuse_reflectance"]), encode_colour(light / max(top, 1e-6)), valid, where)


def list_hypersim(args):
    """Yield every frame of a HyperSim download: its name, and a function of no arguments that converts it."""
    cameras = read_cameras(args.cameras or args.raw / "metadata_camera_parameters.csv")
    found = find_files(args.raw, "**/images/scene_cam_*_final_hdf5/frame.*.color.hdf5")
    for path in found:
        scene = path.parents[2]
        camera = path.parent.name[6:-11]
        frame = path.name.split(".")[1]
        name = f"{scene.name}.{camera}.{frame}"
        yield name, lambda s=scene, c=camera, f=frame: convert_hypersim(s, c, f, cameras, args.out, args.size)


def read_exr(path):
    """(H, W, 3) float32 of an OpenEXR file. raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"data.prepare: no {path.name} in {str(path.parent)!r}; fetch that folder again")
    return formats.decode_exr(path.read_bytes(), f"data.prepare: {str(path)!r}")


def convert_interiorverse(scene, frame, degrees, out, size):
    """Convert one InteriorVerse frame. scene: its folder; frame IIII; degrees: horizontal field of view."""
    where = f"data.prepare: {scene.name} frame {frame}"
    image, albedo, depth, normal, mask = (read_exr(scene / f"{frame}_{m}.exr")
                                          for m in ("im", "albedo", "depth", "normal", "mask"))
    H, W = depth.shape[:2]
    for m, x in dict(im=image, albedo=albedo, normal=normal, mask=mask).items():
        if x.shape[:2] != (H, W):
            raise ValueError(f"{where}: got {m} of {x.shape[1]} x {x.shape[0]} px, want {W} x {H} as depth")
    z = depth[..., 0]
    length = np.linalg.norm(normal, axis=-1)
    valid = ((mask[..., 0] > 0.5) & np.isfinite(z) & (z > 0) & np.isfinite(length) & (length > 0.5)
             & np.isfinite(image).all(-1) & np.isfinite(albedo).all(-1))
    z = np.where(valid, z, 0)
    normal = np.where(valid[..., None], normal, 0)
    rays = fov_rays(degrees, H, W)                                              # z component -1: a point is z * ray
    check_axes(normal, z[..., None] * rays, valid, where)
    lit = valid & (albedo.min(-1) > DIM)
    light = np.where(lit[..., None], image / np.where(lit[..., None], albedo, 1), 0)
    top = np.quantile(light.max(-1)[lit], 0.98) if lit.any() else 0
    dark = np.where(lit[..., None], albedo, 0)                                  # no question asks for light on black
    write_frame(out, f"{scene.name}.{frame}", size, encode_colour(np.where(valid[..., None], image, 0)), z,
                face_camera(normal, rays), encode_colour(dark), encode_colour(light / max(top, 1e-6)), valid, where)


def list_interiorverse(args):
    """As `list_hypersim`, of an InteriorVerse download."""
    for path in find_files(args.raw, "**/*_im.exr"):
        wide = "120" in path.parents[1].name
        degrees = args.fov or (120.0 if wide else 85.0)
        frame = path.name[:-7]
        yield (f"{path.parent.name}.{frame}",
               lambda s=path.parent, f=frame, d=degrees: convert_interiorverse(s, f, d, args.out, args.size))


def convert(args):
    """Convert all frames that OUT does not hold yet; a frame that cannot be used is named, skipped and counted."""
    frames = list(dict(hypersim=list_hypersim, interiorverse=list_interiorverse)[args.what](args))
    if not frames:
        raise FileNotFoundError(f"data.prepare: no {args.what} frame under {str(args.raw)!r}; "
                                "want the downloaded layout (see --help); check the path")
    known = 0
    skipped = []
    for name, make in tqdm(frames, desc=args.what, unit="frame", mininterval=1.0):
        if all((args.out / f"{name}_{m}.png").is_file() for m in MAPS):
            known += 1
            continue
        try:
            make()
        except (FileNotFoundError, ValueError) as error:
            skipped.append(str(error))
            tqdm.write(f"skipped: {error}", file=sys.stderr)
    if len(skipped) == len(frames):
        raise ValueError(f"data.prepare: none of {len(frames)} frames could be converted (first: {skipped[0]})")
    print(f"{args.what}: {len(frames) - known - len(skipped)} frames written to {args.out}, {known} already there, "
          f"{len(skipped)} skipped, of {len(frames)}")


def write_questions(args):
    """Scene folder -> annotated photos and JSON lines in the judge release's layout, split by room."""
    for split, name in questions.JSONL.items():
        rows = questions.build_questions(args.raw, args.pairs, args.size, args.seed, split)
        path = questions.write_jsonl(rows, args.raw, args.out, args.size, name)
        said = ", ".join(f"{m} {sum(r['modality'] == m for r in rows)}" for m in questions.MODALITIES)
        print(f"{path}: {len(rows)} questions ({said})")


def main(argv=None):
    """Command line: hypersim, interiorverse or jsonl."""
    p = Parser(prog="data.prepare", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("what", choices=("hypersim", "interiorverse", "jsonl"),
                   help="hypersim: ai_*/images/scene_cam_*_{final,geometry}_hdf5; interiorverse: SCENE/000_im.exr; "
                        "jsonl: a scene folder to the judge release's training files")
    p.add_argument("raw", type=Path, metavar="RAW", help="folder to read")
    p.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    p.add_argument("--size", type=int, default=512, help="px, side of the squares written [512]")
    p.add_argument("--cameras", type=Path, default=None,
                   help="hypersim: metadata_camera_parameters.csv of apple/ml-hypersim [RAW/that name]")
    p.add_argument("--fov", type=float, default=0.0,
                   help="interiorverse: degrees across [120 under a folder named so, else 85]")
    p.add_argument("--pairs", type=int, default=2, help="jsonl: questions per scene and modality [2]")
    p.add_argument("--seed", type=int, default=0, help="jsonl: seed of the pairs [0]")
    p.limits()
    args = p.parse_args(argv)
    p.at_least(args, 1, "size", "pairs")
    if not args.raw.is_dir():
        raise FileNotFoundError(f"data.prepare: no folder {str(args.raw)!r}; want the downloaded data; check the path")
    if args.what == "jsonl":
        write_questions(args)
    else:
        convert(args)


if __name__ == "__main__":
    run_command(main, "data.prepare")
