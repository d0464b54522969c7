"""The public benchmarks: where their files lie, how they are decoded and masked, and what to fetch.

One row of BENCHMARKS per data set and task; `find` opens a folder or tar, `items` lists its images by the official
list, `load` reads one image with its ground truth. Nothing is downloaded. Sources of the rules: prs-eth/Marigold
(src/dataset, script) for depth, normals and IID; whdr.py of Bell et al. 2014; MeasuredAlbedo/code; intrinsic.py of
Grosse et al. Real files at hand were one DIODE frame and IIW's schema; the other layouts follow the code alone.

item      dict role -> relative name, and name, the photo's own
sample    name; photos [(3, H, W) float32 sRGB in [0, 1]]; and, by task, depth (H, W) float32 metres with mask
          (H, W) bool; normal (3, H, W), 0 = invalid; judgements (IIW's JSON); labels, colors (MAW);
          albedo, shading, residual (3, H, W) *linear* with masks of their shape; lights (MIT's photos, linear);
          size (H, W) that a map must have
"""
import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

import formats
import metrics
from files import decode_json
from photos import find_images, read_rgb
from relations import srgb_encode

LISTS = Path(__file__).parent / "lists"
ETH3D_SIZE = (4032, 6048)             # rows, columns of every depth map; the files have no header
KITTI_SIZE = (352, 1216)              # bottom-aligned, horizontally centred crop
DIODE_CAMERA = (886.81, 927.06, 512.0, 384.0)   # fx, fy, cx, cy in pixels
MIT_OBJECTS = ("box cup1 cup2 dinosaur panther squirrel sun teabag2 "
               "deer frog1 frog2 paper1 paper2 raccoon teabag1 turtle").split()
MIT_LIGHTS = [f"light{k:02d}" for k in range(1, 11)]
LMSE_WINDOWS = 20, 10                 # pixels: side, step
AXIS_MARGIN = 0.5                     # degrees by which another sign choice must fit a set better to be refused
FRAME_MARGIN = 5.0                    # the same on one image, where the normals of its depth are noisy


@dataclass(frozen=True)
class Benchmark:
    """One data set and task; the comments are the meaning, ABOUT has where to fetch it."""

    dataset: str
    task: str                 # depth, normal, whdr, maw, lmse, lights, iid, surface: what protocols.py scores
    needs: tuple              # modalities that a prediction must have
    count: int                # images the official protocol evaluates; 0: as many as the data lists
    protocol: str             # printed beside every number
    tree: tuple               # an example of the layout, one line each
    roots: tuple = (".",)     # where the files may lie under --data: folders or tars
    files: tuple = ()         # (role, part of the photo's name, its replacement) of the files beside the photo
    list_file: str = ""       # in lists/
    range: tuple = ()         # metres: truth strictly inside it counts and predictions are clipped to it
    scale: float = 1.0        # stored value per metre
    processing_res: int = 0   # px, long edge that the official inference uses; 0: the photo's own
    max_res: int = 0          # of the alignment grid (metrics.align_depth)
    also: tuple = ()          # modalities that are scored where the prediction has them
    prediction: str = ""      # how Marigold names a saved depth map: rgb_id (pred_0001.npy) or id (pred_STEM.npy)


FIT = "scale and shift by least squares in depth over the mask, clip to the range, unweighted mean over images"
ANGLES = ("Marigold: both maps renormalised, x right, y up, z to the viewer, zero truth is invalid; mean of the "
          "images' means, and over all pixels pooled (DSINE)")
NORMAL = dict(task="normal", needs=("normal",), files=(("normal", "_img.png", "_normal.npy"),))
BENCHMARKS = (
    Benchmark(
        "nyuv2", "depth", ("depth",), 654,
        f"Marigold: {FIT}; truth .001..10 m, Eigen crop rows 45:471, columns 41:601",
        ("test/kitchen_0004/rgb_0001.png", "test/kitchen_0004/depth_0001.png   16-bit, millimetres"),
        ("nyuv2/nyu_labeled_extracted.tar", "nyu_labeled_extracted.tar", "nyuv2", "nyu_labeled_extracted"),
        (("depth", "rgb_", "depth_"),), "nyuv2_depth.txt", (1e-3, 10.0), 1000, prediction="rgb_id"),
    Benchmark(
        "kitti", "depth", ("depth",), 652,
        f"Marigold: {FIT}; 352 x 1216 benchmark crop, truth .00001..80 m, Eigen crop; 45 of the list's 697 frames have "
        "no truth",
        ("2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png",
         "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png   16-bit, metres x 256"),
        ("kitti/kitti_eigen_split_test.tar", "kitti_eigen_split_test.tar", "kitti", "kitti_eigen_split_test"),
        (), "kitti.txt", (1e-5, 80.0), 256, prediction="id"),
    Benchmark(
        "eth3d", "depth", ("depth",), 454,
        f"Marigold: {FIT}; truth > .00001 m, inf invalid; scale and shift from 1024 of 6048 columns, all rows",
        ("rgb/office/images/dslr_images/DSC_0219.JPG",
         "depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG   "
         "headerless float32, 97,542,144 bytes"),
        ("eth3d/eth3d.tar", "eth3d.tar", "eth3d"),
        (), "eth3d.txt", (1e-5, float("inf")), processing_res=756, max_res=1024, prediction="id"),
    Benchmark(
        "scannet", "depth", ("depth",), 800, f"Marigold: {FIT}; truth .001..10 m",
        ("scene0406_02/color/000300.jpg", "scene0406_02/depth/000300.png   16-bit, millimetres"),
        ("scannet/scannet_val_sampled_800_1.tar", "scannet_val_sampled_800_1.tar", "scannet",
         "scannet_val_sampled_800_1"),
        (("depth", ("/color/", ".jpg"), ("/depth/", ".png")),), "scannet_depth.txt", (1e-3, 10.0), 1000,
        prediction="id"),
    Benchmark(
        "diode", "depth", ("depth",), 771, f"Marigold: {FIT}; mask file only, prediction clipped to .6..350 m",
        ("indoors/scene_00019/scan_00183/00019_00183_indoors_150_000.png",
         "indoors/scene_00019/scan_00183/00019_00183_indoors_150_000_depth.npy   float32 (768, 1024, 1), metres",
         "indoors/scene_00019/scan_00183/00019_00183_indoors_150_000_depth_mask.npy"),
        ("diode/diode_val.tar", "diode_val.tar", "val", "diode/val", "diode"),
        (("depth", ".png", "_depth.npy"), ("mask", ".png", "_depth_mask.npy")), "diode.txt", (0.6, 350.0),
        processing_res=640, prediction="id"),
    Benchmark(
        "nyuv2", count=654, protocol=ANGLES, tree=("000000_img.png", "000000_normal.npy   float (480, 640, 3)"),
        roots=("nyuv2/test", "test", "nyuv2"), list_file="nyuv2_normal.txt", **NORMAL),
    Benchmark(
        "scannet", count=300, protocol=ANGLES, tree=("scene0001_01/001170_img.png", "scene0001_01/001170_normal.npy"),
        roots=("scannet",), list_file="scannet_normal.txt", processing_res=640, **NORMAL),
    Benchmark(
        "ibims", count=100, protocol=ANGLES, tree=("corridor_01_img.png", "corridor_01_normal.npy"),
        roots=("ibims/ibims", "ibims"), list_file="ibims_normal.txt", **NORMAL),
    Benchmark(
        "diode", "normal", ("normal",), 771,
        ANGLES + "; truth is checked against its depth where _depth.npy lies beside it",
        ("indoors/scene_00019/scan_00183/00019_00183_indoors_150_000.png",
         "indoors/scene_00019/scan_00183/00019_00183_indoors_150_000_normal.npy   float (768, 1024, 3)"),
        ("diode/val", "val", "diode/diode_val.tar", "diode_val.tar", "diode"),
        (("normal", ".png", "_normal.npy"),), "diode.txt", processing_res=768),
    Benchmark(
        "iiw", "whdr", ("albedo",), 1046,
        "Bell et al. 2014 whdr.py: weighted disagreement, mean over images; test split: every fifth of the 5230 ids "
        "sorted as strings; linear is the official space, sRGB-encoded that of many papers",
        ("63508.png", "63508.json"), ("iiw-dataset/data", "data", "iiw-dataset"),
        (("judgements", ".png", ".json"),), "iiw.txt"),
    Benchmark(
        "maw", "maw", ("albedo",), 0,
        "Wu et al. 2023: 320 x 240, mean linear sRGB per label, weighted by its pixels, mean over images; intensity "
        "x100 with one scale per image; chromaticity CIEDE2000 at the true mean intensity",
        ("labels/meta.csv   tab-separated: colours .npy, mask .png, scene, name, true albedo, WHDR or None",
         "labels/<the .npy and .png it names>", "images_png/<scene>/<name>.png"), (".", "maw")),
    Benchmark(
        "mit", "lmse", ("albedo", "irradiance"), 16,
        "Grosse et al. 2009: gray linear maps, windows of 20 px every 10, half shading, half reflectance, mean over "
        "the 16 evaluated objects. Ours: the photo shown is diffuse.png over its 99 % quantile, sRGB-encoded",
        ("box/diffuse.png  box/reflectance.png  box/shading.png  box/mask.png   16-bit linear PNG",),
        ("MIT-intrinsic/data", "data", "MIT-intrinsic"),
        (("albedo", "diffuse", "reflectance"), ("shading", "diffuse", "shading"), ("mask", "diffuse", "mask"))),
    Benchmark(
        "mit", "lights", ("albedo",), 16,
        "OURS: one albedo from each of ten lightings; 1 - cos^2 of two albedos over the mask, mean over all pairs; a "
        "constant albedo scores 0, so read it beside LMSE",
        ("box/light01.png ... box/light10.png  box/mask.png   16-bit linear PNG",),
        ("MIT-intrinsic/data", "data", "MIT-intrinsic"),
        (("mask", "light01", "mask"), *((k, "light01", k) for k in MIT_LIGHTS[1:]))),
    Benchmark(
        "hypersim", "iid", ("albedo",), 5238,
        "Marigold IID lighting: albedo ^(1/2.2); shading and residual clipped and divided by the larger q98, one "
        "least-squares scale, x .8 / q90 of true brightness, clamp 0..1; PSNR on valid elements, SSIM with invalid "
        "ones at 0",
        ("test/ai_001_010/rgb_cam_00_fr0000.png",
         "test/ai_001_010/albedo_cam_00_fr0000.npy   float (768, 1024, 3), linear; likewise shading_, residual_"),
        ("hypersim",), tuple((m, ("rgb_", ".png"), (f"{m}_", ".npy")) for m in ("albedo", "shading", "residual")),
        "hypersim.txt", also=("irradiance", "residual")),
    Benchmark(
        "interiorverse", "iid", ("albedo",), 2672,
        "Marigold IID appearance: EXR clipped to 0..1, ^(1/2.2), albedo compared as sRGB, no mask, no alignment",
        ("scenes_85/<scene>/000_im.exr", "scenes_85/<scene>/000_albedo.exr   (or .npy of the same name, linear)"),
        ("interiorverse/InteriorVerse.tar", "InteriorVerse.tar", "interiorverse", "InteriorVerse"),
        (("albedo", "_im.", "_albedo."),), "interiorverse.txt", processing_res=640),
    Benchmark(
        "photos", "surface", ("depth", "normal"), 0,
        "OURS where the paper is silent: normals from predicted depth by central differences against predicted "
        "normals, at the photo's size; focal length = longer side, z = 1 + 2 d; RMSE over components, SSIM of "
        "(n + 1) / 2 where every normal of its window has a depth > 0",
        ("your folder of photos",)),
)
DATASETS = tuple(dict.fromkeys(b.dataset for b in BENCHMARKS))
MARIGOLD_DEPTH = "share.phys.ethz.ch/~pf/bingkedata/marigold/evaluation_dataset (named in prs-eth/Marigold's README)"
MARIGOLD_NORMAL = ("share.phys.ethz.ch/~pf/bingkedata/marigold/marigold_normals/evaluation_dataset.zip "
                   "(named in prs-eth/Marigold's README)")
UNCHECKED = "(from memory, not checked)"
ABOUT = {  # (dataset, task): (source, licence, size)
    ("nyuv2", "depth"): (MARIGOLD_DEPTH + ", nyuv2/", "research use " + UNCHECKED, ""),
    ("kitti", "depth"): (MARIGOLD_DEPTH + ", kitti/", "CC BY-NC-SA 3.0 " + UNCHECKED, ""),
    ("eth3d", "depth"): (MARIGOLD_DEPTH + ", eth3d/; or eth3d.net, high-res multi-view, training: dslr_jpg, dslr_depth",
                         "CC BY-NC-SA 4.0 " + UNCHECKED, "44 GB of depth (454 x 97,542,144 bytes), photos not counted"),
    ("scannet", "depth"): (MARIGOLD_DEPTH + ", scannet/", "ScanNet terms of use, non-commercial " + UNCHECKED, ""),
    ("diode", "depth"): ("diode-dataset.org, validation split, photos and depth; or " + MARIGOLD_DEPTH + ", diode/",
                         "MIT", "4.9 GB of depth and masks (771 x 2 x 3,145,856 bytes), photos not counted"),
    ("nyuv2", "normal"): (MARIGOLD_NORMAL + ", nyuv2/test", "research use " + UNCHECKED, ""),
    ("scannet", "normal"): (MARIGOLD_NORMAL + ", scannet/", "ScanNet terms of use, non-commercial " + UNCHECKED, ""),
    ("ibims", "normal"): (MARIGOLD_NORMAL + ", ibims/ibims", "see the data set's page", ""),
    ("diode", "normal"): ("diode-dataset.org, validation split, photos and normals", "MIT", ""),
    ("iiw", "whdr"): ("opensurfaces.cs.cornell.edu/intrinsic: the IIW release, 5230 pairs; the 1046 listed are used",
                      "see the release; the photos are Flickr's, each under its own CC licence " + UNCHECKED, ""),
    ("maw", "maw"): ("github.com/MeasuredAlbedo/code, README: labels.zip and images_png.zip", "none stated", ""),
    ("mit", "lmse"): ("the authors' page of 'Ground truth dataset and baseline evaluations for intrinsic image "
                      "algorithms' (intrinsic-data.tar.gz)", "see the data set's README", ""),
    ("hypersim", "iid"): ("github.com/apple/ml-hypersim, test scenes, through script/iid/dataset_preprocess of "
                          "prs-eth/Marigold", "CC BY-SA 3.0",
                          "about 300 GB if stored as float64 (5238 x 3 arrays of 768 x 1024 x 3), half as float32"),
    ("interiorverse", "iid"): ("interiorverse.github.io, scenes_85, on application", "research, on application", ""),
    ("photos", "surface"): ("your own photos (the paper: COCO, ETH3D)", "yours", ""),
}
ABOUT["mit", "lights"] = ABOUT["mit", "lmse"]


class MissingData(Exception):
    """Files of a benchmark that are not there; `page` says what to fetch and where it goes."""

    def __init__(self, message, page):
        super().__init__(message)
        self.page = page


def chosen(dataset, task=""):
    """The rows of a data set: of the task that is named, else depth before normals, and both of MIT's."""
    rows = [b for b in BENCHMARKS if b.dataset == dataset and (not task or task in (b.task, *b.needs))]
    if not rows:
        tasks = ", ".join(b.task for b in BENCHMARKS if b.dataset == dataset)
        raise ValueError(f"--task {task} does not fit --dataset {dataset}; want one of: {tasks}")
    return rows if task or dataset == "mit" else rows[:1]


def read_list(name):
    """Names of a list file in order: [(name, has ground truth)] (the format: lists/SOURCE.md)."""
    found = []
    for line in (LISTS / name).read_text().splitlines():
        pattern, *values = line.split()
        found += [(pattern.replace("*", v.rstrip("!")), not v.endswith("!")) for v in values]
    return found


def swap(name, old, new):
    """Replace the last occurrence of each part of a name: the rule by which other columns follow from the first."""
    for a, b in zip([old] if isinstance(old, str) else old, [new] if isinstance(new, str) else new, strict=True):
        if a:
            head, found, tail = name.rpartition(a)
            if not found:
                raise ValueError(f"{name!r}: got a name without {a!r}; want one of the official list; correct it")
            name = head + b + tail
    return name


def _item(bench, name):
    item = dict(rgb=name, **{role: swap(name, old, new) for role, old, new in bench.files})
    if bench.dataset == "kitti":                                                # day/drive/image_02/data/X.png
        _, drive, camera, _, frame = PurePosixPath(name).parts
        item["depth"] = f"{drive}/proj_depth/groundtruth/{camera}/{frame}"
    if bench.dataset == "eth3d":                                                # rgb/SCENE/images/dslr_images/X.JPG
        scene, photo = PurePosixPath(name).parts[1], PurePosixPath(name).name
        item["depth"] = f"depth/{scene}_dslr_depth/{scene}/ground_truth_depth/dslr_images/{photo}"
    return dict(item, name=name)


def items(bench, files):
    """Every image of the official protocol, in its order: a list of dict role -> relative name."""
    if bench.dataset == "photos":
        found = find_images(files.path) if files.index is None else []
        root = files.path if files.path.is_dir() else files.path.parent
        return [_item(bench, str(p.relative_to(root))) for p in found]
    if bench.dataset == "mit":
        return [_item(bench, f"{tag}/{'diffuse' if bench.task == 'lmse' else 'light01'}.png") for tag in MIT_OBJECTS]
    if bench.dataset == "maw":
        return _maw_items(files)
    found = [_item(bench, name) for name, known in read_list(bench.list_file) if known]
    if len(found) != bench.count:
        raise ValueError(f"lists/{bench.list_file}: got {len(found)} images with truth, want {bench.count}; restore it")
    return found


def _maw_items(files):
    meta = "labels/meta.csv"
    if files.size(meta) < 0:
        return [dict(name=meta, rgb=meta)]                                      # reported as the missing file
    try:
        rows = [r for r in csv.reader(io.StringIO(files.read(meta).decode()), delimiter="\t") if r]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{files.where(meta)}: got no table ({error}), want UTF-8, tabs; fetch it again") from None
    if not rows:
        raise ValueError(f"{files.where(meta)}: got no line, want one for each photo; fetch it again")
    for line, row in enumerate(rows, 1):
        if len(row) != 6:
            raise ValueError(f"{files.where(meta)} line {line}: got {len(row)} columns, want 6 separated by tabs; "
                             "fetch it again")
    photos = [f"images_png/{r[2]}/{r[3]}.png" for r in rows]                    # results are kept by name
    times = Counter(photos)
    return [dict(name=p if times[p] == 1 else f"{p} {r[0]} {r[1]}", rgb=p, colors=f"labels/{r[0]}",
                 mask=f"labels/{r[1]}") for p, r in zip(photos, rows, strict=True)]


def complete(files, item):
    """Whether all files of an item exist."""
    return all(files.size(item[role]) >= 0 for role in item if role != "name")


def _resolved(files, item):
    """The item with the .npy that lies beside an .exr, or in its place, put for it."""
    return {role: f[:-4] + ".npy" if role != "name" and f.endswith(".exr") and files.size(f[:-4] + ".npy") >= 0 else f
            for role, f in item.items()}


def find(bench, path):
    """Open the data: the folder or tar under `path` that holds most of the official files -> (Files, items, missing).

    missing  names of files that are not there, in list order
    raises   MissingData with the page when nothing is there; ValueError for a path that is no folder or tar
    """
    if not path:
        raise MissingData(f"--dataset {bench.dataset} needs --data DIR with its files", page(bench))
    if not os.path.exists(path):
        raise MissingData(f"--data {path}: got no such folder or tar, want the files of {bench.dataset}", page(bench))
    if bench.dataset == "photos":
        files = formats.Files(path if Path(path).is_dir() else Path(path).parent)
        files.path = Path(path) if Path(path).is_file() else files.path
        return files, items(bench, files), []
    top, best = formats.Files(path), None
    places = [top] if top.index is None else [top, *(top.under(r) for r in bench.roots if not r.endswith(".tar"))]
    for root in bench.roots if top.index is None else ():
        inside = Path(path, root)
        if inside.is_dir() or inside.is_file():
            places.append(formats.Files(inside))
    for files in places:
        found = [_resolved(files, item) for item in items(bench, files)]
        n = sum(complete(files, item) for item in found)
        if best is None or n > best[0]:
            best = n, files, found
    n, files, found = best
    missing = [item[r] for item in found for r in item if r != "name" and files.size(item[r]) < 0]
    missing = list(dict.fromkeys(missing))
    if n == 0:
        raise MissingData(f"--data {path}: got none of the {len(found)} images of {bench.dataset} "
                          f"(first missing: {missing[0]})", page(bench, missing))
    return files, found, missing


def page(bench, missing=()):
    """What to fetch and where it goes, as text."""
    source, licence, size = ABOUT[bench.dataset, bench.task]
    roots = [r for r in bench.roots if r != "."]
    expected = f"{bench.count} images are" if bench.count else f"every image of {bench.tree[0].split('  ')[0]} is"
    tar = "" if bench.dataset == "photos" else ", or an uncompressed .tar with the same names"
    lines = [f"{bench.dataset} ({bench.task}): {expected} expected.", f"Expected under --data (a folder{tar}):",
             *("    " + line for line in bench.tree)]
    if roots:
        lines.append("The files may also lie below it in one of: " + ", ".join(roots))
    lines += [f"Source:  {source}", f"Licence: {licence}", f"Size:    {size or 'not known here'}"]
    if bench.list_file:
        lines.append(f"List:    lists/{bench.list_file}, {bench.count} images with truth (names only; already here)")
    if missing:
        lines += [f"Missing: {len(missing)} files, the first ones:", *("    " + m for m in missing[:5])]
    return "\n".join([*lines, "Nothing is downloaded by this program."])


# reading one image ------------------------------------------------------------------------------------------------

def _chw(pixels):
    """(H, W, 3) uint8 or float -> (3, H, W) float32 tensor in [0, 1]."""
    tensor = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
    return tensor.float().div_(255) if pixels.dtype == np.uint8 else tensor.float()


def _linear(files, name):
    """A linear colour map, .exr or .npy -> (3, H, W) float32."""
    decode = formats.decode_exr if name.endswith(".exr") else formats.decode_npy
    array = decode(files.read(name), files.where(name)).astype(np.float32, copy=False)
    if not array.size or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{files.where(name)}: got shape {array.shape}, want (H, W, 3); fetch it again")
    return array.transpose(2, 0, 1)


def _same_size(where, got, want):
    if tuple(got) != tuple(want):
        raise ValueError(f"{where}: got {got[1]} x {got[0]} pixels, want {want[1]} x {want[0]} as the others; "
                         "fetch it again")


def load(bench, files, item, axes=False):
    """One image with its ground truth (see `sample` above); axes: check true normals against depth where there is one.

    raises   FileNotFoundError, ValueError (a damaged file, an empty mask, another size, wrong axes)
    """
    sample = _LOADERS[bench.task](bench, files, item)
    if axes and bench.dataset == "diode" and bench.task == "normal":
        _check_axes(files, item, sample)
    return dict(sample, name=item["name"])


def _load_depth(bench, files, item):
    where = files.where(item["depth"])
    mask = None
    if bench.dataset == "eth3d":
        depth = formats.decode_floats(files.read(item["depth"]), where, ETH3D_SIZE)
        depth[np.isposinf(depth)] = 0
    elif bench.dataset == "diode":
        depth, mask = _diode_depth(files, item["depth"], item["mask"])
    else:
        depth = formats.decode_gray(files.read(item["depth"]), where)
        if depth.dtype != np.uint16:
            raise ValueError(f"{where}: got 8-bit depth, want 16 bits, {bench.scale:g} a metre; fetch it again")
        depth = depth.astype(np.float32) / np.float32(bench.scale)
    rgb = _chw(formats.decode_rgb(files.read(item["rgb"]), files.where(item["rgb"])))
    _same_size(where, depth.shape, rgb.shape[1:])
    if bench.dataset == "kitti":
        (h, w), (H, W) = KITTI_SIZE, depth.shape
        if H < h or W < w:
            raise ValueError(f"{where}: got {W} x {H} pixels, want at least {w} x {h}; fetch it again")
        left = int((W - w) / 2)
        depth, rgb = depth[H - h:, left:left + w], rgb[:, H - h:, left:left + w]
    if mask is None:
        mask = valid_depth(bench, depth)
    if not mask.any():
        raise ValueError(f"{where}: got an empty mask, want at least one pixel with a depth in "
                         f"{bench.range[0]:g}..{bench.range[1]:g} m; fetch it again")
    return dict(photos=[rgb], depth=depth, mask=mask, size=depth.shape)


def _diode_depth(files, depth_name, mask_name):
    """DIODE's depth, (H, W) float32 metres, and its mask, (H, W) bool, finite and above 0 inside it."""
    depth, mask = (formats.decode_npy(files.read(n), files.where(n)) for n in (depth_name, mask_name))
    depth, mask = (x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x for x in (depth, mask))
    for name, x in ((depth_name, depth), (mask_name, mask)):
        if x.ndim != 2:
            raise ValueError(f"{files.where(name)}: got shape {x.shape}, want one value per pixel; fetch it again")
    if not np.isfinite(mask).all():
        raise ValueError(f"{files.where(mask_name)}: got non-finite values, want 0 or 1; fetch it again")
    _same_size(files.where(mask_name), mask.shape, depth.shape)
    depth, mask = depth.astype(np.float32), mask.astype(bool)
    if not (depth[mask] > 0).all() or not np.isfinite(depth[mask]).all():
        raise ValueError(f"{files.where(depth_name)}: got a depth in the mask that is not finite or not above 0, want "
                         "metres; fetch it again")
    return depth, mask


def valid_depth(bench, depth):
    """Pixels that count: strictly inside the range, and inside the crop of NYUv2 or KITTI."""
    mask = (depth > bench.range[0]) & (depth < bench.range[1])
    crop, (H, W) = np.zeros_like(mask), depth.shape
    if bench.dataset == "nyuv2":
        crop[45:471, 41:601] = True
    elif bench.dataset == "kitti":
        crop[int(0.3324324 * H):int(0.91351351 * H), int(0.0359477 * W):int(0.96405229 * W)] = True
    else:
        crop[:] = True
    return mask & crop


def _load_normal(bench, files, item):
    where = files.where(item["normal"])
    normal = formats.decode_npy(files.read(item["normal"]), where).astype(np.float32)
    if normal.ndim != 3 or normal.shape[2] != 3:
        raise ValueError(f"{where}: got shape {normal.shape}, want (H, W, 3); fetch it again")
    rgb = _chw(formats.decode_rgb(files.read(item["rgb"]), files.where(item["rgb"])))
    _same_size(where, normal.shape[:2], rgb.shape[1:])
    if not np.isfinite(normal).all():
        raise ValueError(f"{where}: got non-finite normals, want zero vectors at invalid pixels; set them to zero")
    if not normal.any():
        raise ValueError(f"{where}: got an empty mask (all normals zero), want at least one; fetch it again")
    return dict(photos=[rgb], normal=normal.transpose(2, 0, 1), size=normal.shape[:2])


def _check_axes(files, item, sample):
    depth_name, mask_name = (swap(item["rgb"], ".png", end) for end in ("_depth.npy", "_depth_mask.npy"))
    if files.size(depth_name) < 0 or files.size(mask_name) < 0:
        return
    depth, mask = _diode_depth(files, depth_name, mask_name)
    _same_size(files.where(depth_name), depth.shape, sample["size"])
    derived = metrics.normals_from_depth(np.where(mask, depth, 0), *DIODE_CAMERA)
    wrong = wrong_axes(metrics.axis_errors(derived, sample["normal"]), "normals of its depth", FRAME_MARGIN)
    if wrong:
        raise ValueError(f"{files.where(item['normal'])}: {wrong}")


def wrong_axes(errors, other, margin=AXIS_MARGIN):
    """What is wrong with normals that fit `other` better by the margin under another of the 8 sign choices, or ""."""
    best = min(errors, key=errors.get) if errors else None
    if not best or errors[best] >= errors[1, 1, 1] - margin:
        return ""
    x, y, z = ("-" if s < 0 else "+" for s in best)
    return (f"got wrong normal axes: ({x}x, {y}y, {z}z) fits the {other} at {errors[best]:.1f} degrees, as stored "
            f"{errors[1, 1, 1]:.1f}; want x right, y up, z to the viewer in both; either may be the wrong one (files "
            "in DSINE's frame need (-x, +y, +z)): flip those signs there")


def _fits(where, measure, *args):
    """Refuse by its file a truth that the measure itself would refuse."""
    try:
        measure(*args)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _load_whdr(bench, files, item):
    rgb = _chw(formats.decode_rgb(files.read(item["rgb"]), files.where(item["rgb"])))
    judgements = decode_json(files.read(item["judgements"]), files.where(item["judgements"]))
    _fits(files.where(item["judgements"]), metrics.whdr, np.ones((8, 8, 3)), judgements)
    return dict(photos=[rgb], judgements=judgements, size=tuple(rgb.shape[1:]))


def _load_maw(bench, files, item):
    rgb = _chw(formats.decode_rgb(files.read(item["rgb"]), files.where(item["rgb"])))
    colors = formats.decode_npy(files.read(item["colors"]), files.where(item["colors"]))
    labels = formats.decode_gray(files.read(item["mask"]), files.where(item["mask"]))
    _fits(files.where(item["mask"]), metrics.maw_intensity, np.zeros((*metrics.MAW_SIZE, 3), np.uint8), labels, colors)
    return dict(photos=[rgb], colors=colors, labels=labels, size=tuple(rgb.shape[1:]))


def _mit_photo(files, name, mask):
    """One of MIT's photos, linear: (3, H, W) float32."""
    pixels = formats.decode_png_linear(files.read(name), files.where(name))
    _same_size(files.where(name), pixels.shape[:2], mask.shape)
    return np.broadcast_to(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1), (3, *mask.shape))


def _shown(photo, mask):
    """MIT's linear photo as the predictor sees it: over its 99 % quantile in the mask, clipped, sRGB-encoded."""
    top = max(float(np.quantile(photo[:, mask], 0.99)), 1e-6)
    return srgb_encode(torch.from_numpy(np.minimum(photo / top, 1)).float())


def _mit_mask(files, item):
    mask = formats.decode_png_linear(files.read(item["mask"]), files.where(item["mask"]))
    mask = (mask if mask.ndim == 2 else mask.max(2)) > 0
    if not mask.any():
        raise ValueError(f"{files.where(item['mask'])}: got an empty mask, want an object; fetch it again")
    return mask


def _load_lmse(bench, files, item):
    mask = _mit_mask(files, item)
    photo, albedo, shading = (_mit_photo(files, item[m], mask) for m in ("rgb", "albedo", "shading"))
    for m, x in (("albedo", albedo), ("shading", shading)):
        _fits(files.where(item[m]), metrics.lmse, x.mean(0), x.mean(0), mask, *LMSE_WINDOWS)
    return dict(photos=[_shown(photo, mask)], mask=mask, size=mask.shape, albedo=albedo, shading=shading)


def _load_lights(bench, files, item):
    mask = _mit_mask(files, item)
    names = [item["rgb"], *(item[k] for k in MIT_LIGHTS[1:])]
    lights = [_mit_photo(files, n, mask) for n in names]
    return dict(photos=[_shown(x, mask) for x in lights], mask=mask, size=mask.shape, lights=lights)


def _colours(where, x):
    bad = np.count_nonzero(~(x >= 0))
    if bad:
        raise ValueError(f"{where}: got {bad} values that are negative or no number, want linear colour; "
                         "fetch it again")


def _load_iid(bench, files, item):
    if bench.dataset == "interiorverse":
        photo, albedo = (_linear(files, item[m]).clip(0, 1) for m in ("rgb", "albedo"))
        for m, x in (("rgb", photo), ("albedo", albedo)):
            _colours(files.where(item[m]), x)
        rgb = torch.from_numpy(photo ** (1 / 2.2)).float()
        _same_size(files.where(item["albedo"]), albedo.shape[1:], rgb.shape[1:])
        return dict(photos=[rgb], albedo=albedo, size=albedo.shape[1:])
    rgb = _chw(formats.decode_rgb(files.read(item["rgb"]), files.where(item["rgb"])))
    truth = {m: _linear(files, item[m]) for m in ("albedo", "shading", "residual")}
    for m, x in truth.items():
        _same_size(files.where(item[m]), x.shape[1:], rgb.shape[1:])
    finite = {m: np.isfinite(x) for m, x in truth.items()}
    _colours(files.where(item["albedo"]), truth["albedo"][finite["albedo"]])
    masks = {f"{m}_mask": ok for m, ok in finite.items()}
    masks["albedo_mask"] = finite["albedo"] & (truth["albedo"] != 0).any(0)     # black: no surface
    for m in truth:
        if not masks[f"{m}_mask"].any():
            raise ValueError(f"{files.where(item[m])}: got an empty mask, want finite values; fetch it again")
    # differs: the official quantile is NaN, and with it the whole image, when one value is not finite
    top = max(float(np.quantile(truth[m][finite[m]], 0.98)) for m in ("shading", "residual"))
    for m in ("shading", "residual"):
        truth[m] = np.where(finite[m], truth[m].clip(0, top) / max(top, 1e-12), 0)
    truth["albedo"] = np.where(finite["albedo"], truth["albedo"], 0)
    return dict(photos=[rgb], size=tuple(rgb.shape[1:]), **truth, **masks)


def _load_surface(bench, files, item):
    root = files.path if files.path.is_dir() else files.path.parent
    rgb = read_rgb(root / item["rgb"])
    return dict(photos=[rgb], size=tuple(rgb.shape[1:]))


_LOADERS = {"depth": _load_depth, "normal": _load_normal, "whdr": _load_whdr, "maw": _load_maw, "lmse": _load_lmse,
            "lights": _load_lights, "iid": _load_iid, "surface": _load_surface}


# saved predictions ------------------------------------------------------------------------------------------------

def prediction_file(bench, files, name, modality):
    """Where the saved map of a photo is expected, or the first accepted name that exists.

    depth    pred_STEM.npy (NYUv2: pred_0001.npy), normals STEM.npy, IID STEM_albedo.npy, STEM_shading.npy (Marigold's)
    others   STEM_MODALITY.npy; albedo and shading also .png; IIW and MAW also STEM-r.png (Bell et al.) and STEM.png
    """
    place, stem = PurePosixPath(name).parent, PurePosixPath(name).stem
    if bench.task == "depth":
        return str(place / f"pred_{stem.split('_')[1] if bench.prediction == 'rgb_id' else stem}.npy")
    if bench.task == "normal":
        return str(place / f"{stem}.npy")
    ending = "shading" if bench.task == "iid" and modality == "irradiance" else modality
    accepted = [f"{stem}_{ending}.npy"]
    if modality in ("albedo", "irradiance"):
        accepted.append(f"{stem}_{ending}.png")
    if bench.task in ("whdr", "maw"):
        accepted += [f"{stem}-r.png", f"{stem}.npy", f"{stem}.png"]
    names = [str(place / n) for n in accepted]
    return next((n for n in names if files.size(n) >= 0), names[0])


def read_prediction(files, name, modality):
    """One saved map -> (C, H, W) float array as stored; an 8-bit .png of albedo or irradiance is over 255.

    raises   FileNotFoundError; ValueError: another number of channels, another type, alpha, 16 bits
    """
    where = files.where(name)
    if name.endswith(".png"):
        return formats.decode_rgb(files.read(name), where).transpose(2, 0, 1) / 255.0
    array = formats.decode_npy(files.read(name), where)
    channels = 1 if modality == "depth" else 3
    if array.ndim == 2 and channels == 1:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] != channels and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != channels:
        raise ValueError(f"{where}: got shape {array.shape}, want ({channels}, H, W); save it again")
    if array.dtype.kind != "f":
        raise ValueError(f"{where}: got {array.dtype} values, want floating point; save it again")
    return array
