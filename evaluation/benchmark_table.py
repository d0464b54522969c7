"""The public benchmarks, one row each: task, official count, protocol, layout, source, licence. Nothing is read here.

Sources of the rules: prs-eth/Marigold (src/dataset, script) for depth, normals and IID; whdr.py of Bell et al. 2014;
MeasuredAlbedo/code; intrinsic.py of Grosse et al. Nothing is downloaded.
"""
from dataclasses import dataclass, replace

MIT_LIGHTS = [f"light{k:02d}" for k in range(1, 11)]


@dataclass(frozen=True)
class Benchmark:
    """One data set and task; ABOUT says where to fetch it."""

    dataset: str
    task: str                 # depth, normal, whdr, maw, lmse, lights, iid, surface: what protocols.py scores
    needs: tuple              # modalities that a prediction must have
    count: int                # images the official protocol evaluates; 0: as many as the data lists
    protocol: str             # printed beside every number
    tree: tuple               # an example of the layout, one line each
    roots: tuple = (".",)     # folders or tars under --data in which the files may be
    files: tuple = ()         # (role, part of the photo's name, its replacement) of the files beside the photo
    list_file: str = ""       # in evaluation/lists/
    range: tuple = ()         # metres: only truth strictly inside counts, predictions are clipped to it
    scale: float = 1.0        # stored value per metre
    processing_res: int = 0   # px, long edge that the official inference uses; 0: the photo's own
    max_res: int = 0          # of the alignment grid (metrics.align_depth)
    also: tuple = ()          # modalities that are scored where the prediction has them
    align: str = "depth"      # of a depth: a key of ALIGNMENTS
    prediction: str = ""      # how Marigold names a saved depth map: rgb_id (pred_0001.npy) or id (pred_STEM.npy)


PLAIN = "depth"                  # --align: least squares in depth, the default
FIT = "scale and shift by least squares in depth over the mask, clip to the range, unweighted mean over images"
ALIGNMENTS = {  # --align (alignment.py): what is printed with every number, and the rule
    PLAIN: ("aligned in depth", FIT),
    "disparity": ("aligned in disparity",
                  "scale and shift by least squares in disparity (1 / truth) where the predicted disparity is above 0, "
                  "clip at .001, invert, clip to the range, unweighted mean over images"),
    "log-ransac": ("aligned by RANSAC in log depth",
                   "data and mask, unweighted mean over images; OURS: scale and shift of log depth by RANSAC (1000 "
                   "lines through two pixels, threshold: the median absolute deviation of true log depth), least "
                   "squares on its inliers, clip at 1 km and to the range"),
}
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
DA2K = Benchmark(             # read by da2k.py: pairs of points, no maps
    "da2k", "pairs", ("depth",), 0,
    "share of pairs whose closer point is told; red and green are drawn at random; bootstrap over images; no alignment",
    ("annotations.json", "images/indoor/0001.jpg   and the other images that it names"), ("DA-2K", "DA-2K/DA-2K"),
    processing_res=768)
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
    ("interiorverse", "iid"): ("interiorverse.github.io, scenes_85, on application; the publisher has since withdrawn "
                               "most of the 2672 frames: --limit 2672 evaluates those that you have, marked PARTIAL",
                               "research, on application", ""),
    ("photos", "surface"): ("your own photos (the paper: COCO, ETH3D)", "yours", ""),
}
ABOUT["da2k", "pairs"] = ("huggingface.co/datasets/depth-anything/DA-2K: DA-2K.zip", "Apache-2.0", "681 MB")
ABOUT["mit", "lights"] = ABOUT["mit", "lmse"]


class MissingData(Exception):
    """Files of a benchmark are missing; `page` says what to fetch and where to put it."""

    def __init__(self, message, page):
        super().__init__(message)
        self.page = page


def choose_benchmarks(dataset, task=""):
    """The rows of a data set for a task; without a task the first row (depth before normals), of MIT both."""
    rows = [b for b in BENCHMARKS if b.dataset == dataset and (not task or task in (b.task, *b.needs))]
    if not rows:
        tasks = ", ".join(b.task for b in BENCHMARKS if b.dataset == dataset)
        raise ValueError(f"--task {task} does not fit --dataset {dataset}; want one of: {tasks}")
    return rows if task or dataset == "mit" else rows[:1]


def align_benchmark(bench, align):
    """The row with another alignment of its depth. raises ValueError: it scores no depth."""
    if align == bench.align:
        return bench
    if bench.task != "depth":
        raise ValueError(f"--align {align}: got --dataset {bench.dataset}, task {bench.task}; want a benchmark of "
                         "depth; leave it out")
    return replace(bench, align=align, protocol=bench.protocol.replace(FIT, ALIGNMENTS[align][1]))


def missing_page(bench, missing=()):
    """What to fetch and where to put it, as text."""
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
        lines.append(f"List:    evaluation/lists/{bench.list_file}, {bench.count} images with truth (names only; "
                     "already here)")
    if missing:
        lines += [f"Missing: {len(missing)} files, the first ones:", *("    " + m for m in missing[:5])]
    return "\n".join([*lines, "Nothing is downloaded by this program."])
