"""Evaluate predictors and judges: one table per data set, with its protocol and a paired interval.

    python eval.py --dataset wild                                       OUT/grpo against OUT/base, and the judge
    python eval.py --dataset scenes --data DIR --checkpoint X --compare BASE
    python eval.py --dataset judge --scenes DIR --judge MODEL           a judge against ground truth
    python eval.py --dataset da2k --data DIR --judge MODEL              point pairs of DA-2K, a judge or a predictor
    python eval.py --dataset eth3d --data DIR --checkpoint X            a public benchmark (--list-datasets)
    python eval.py --dataset nyuv2 --data DIR --pred-dir MAPS           another method's saved maps
Procedural sets use test scenes, which no stage trains or is tuned on. Numbers are unweighted means over images.
Results of every benchmark image are appended to OUT/eval/*.jsonl: the same command again goes on where it was killed.
"""
import sys
from pathlib import Path

from data.pools import ScenePool, scene_batch
from evaluation import benchmark_report
from evaluation.benchmark_table import ALIGNMENTS, DATASETS, PLAIN, MissingData
from evaluation.da2k import report_pairs
from evaluation.page import update_page
from evaluation.report import compared_paths, report_judge, report_scenes
from evaluation.scores import PAIRS, eval_pairs, judge_answers, judge_scores, predict_maps, score_maps
from judge import load_judge
from predictor import load_predictor
from relations import NAMES
from runtime.command import run_command
from runtime.files import write_json
from runtime.flags import Parser
from runtime.ranks import pick_device
from runtime.run import about
from runtime.weights import add_flip

PROCEDURAL = ("synthetic", "broad", "wild")


def main(argv=None):
    """Command line: the tables of one data set."""
    args = arguments(argv)
    if args.list_datasets:
        return benchmark_report.list_datasets(PROCEDURAL)
    report = dict(judge=report_judge, da2k=report_pairs).get(args.dataset, evaluate_scenes)
    if args.dataset in DATASETS:
        report = benchmark_report.check_data if args.check_data else benchmark_report.report_benchmarks
    try:
        result = report(args)
    except MissingData as error:
        print(f"eval.py: {error}\n{error.page}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        write_json(args.json, dict(result, about=about()))
        update_page(args.json, say=True)


def evaluate_scenes(args):
    """The tables of procedural scenes or of a scene folder, with the judge on the same pairs."""
    out = Path(args.out)
    device = pick_device("auto", "eval.py")
    new, old = compared_paths(args)
    policies = [load_predictor(path).to(device) for path in (new, old) if path]
    for policy in policies:
        lacking = [m for m in NAMES if m not in policy.modalities]
        if lacking:
            raise ValueError(f"--dataset {args.dataset} scores all of {', '.join(NAMES)}: got a predictor of "
                             f"{', '.join(policy.modalities)}; want one that has {', '.join(lacking)}, or a benchmark "
                             "of what it predicts (--list-datasets)")
    size = args.size or policies[0].size
    asked = args.judge != "none" and (args.judge or (out / "judge").is_dir())
    judge = load_judge(args.judge or out / "judge", device) if asked else None
    if args.dataset == "scenes":
        maps = scene_batch(args.data, size)
        maps["depth"] = maps["depth"] + 1                                       # affine in [0, 1]: no zero to divide by
    else:
        maps = ScenePool(args.dataset, "test", args.images, size).all()
    pairs = eval_pairs(maps, PAIRS, 1, args.seed)
    pred = [predict_maps(policy, maps["rgb"], args.denoise_steps or 10, args.seed) for policy in policies]
    values = [score_maps(p, maps, pairs) for p in pred]
    judge_values = None
    if judge is not None:
        judge_values = judge_scores(judge_answers(judge, maps, args.seed, args.dataset), maps, pred[-1])
    return report_scenes(args.dataset, values[0], values[1] if old else None, judge_values)


def arguments(argv):
    """Parse and check the command line; a user error exits with 2 before any model is loaded."""
    p = Parser(prog="eval.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    _add_data_flags(p)
    _add_predictor_flags(p)
    p.limits()
    args = p.parse_args(argv)
    if args.list_datasets:
        return args
    if not args.dataset:
        p.error("the following arguments are required: --dataset")
    p.at_least(args, 1, "images", "denoise_steps", "ensemble_size", "pairs")
    p.at_least(args, 0, "limit", "panels", "processing_res")
    if len(args.compare) > 2 or (len(args.compare) == 2 and (args.checkpoint or args.pred_dir)):
        p.error("--compare: want BASE beside --checkpoint or --pred-dir, or the two of them alone")
    if args.checkpoint and args.pred_dir:
        p.error("--checkpoint and --pred-dir: want one of them")
    if args.flip_x and not args.checkpoint and not args.compare:
        p.error(f"--flip-x {args.flip_x} is said of --checkpoint and --compare, which are not given")
    args.checkpoint = add_flip(args.checkpoint, args.checkpoint and args.flip_x)
    args.compare = [add_flip(spec, args.flip_x) for spec in args.compare]
    public = args.dataset in DATASETS
    pairs = args.dataset == "da2k"
    for name in ("task", "limit", "pred_dir", "pred_space", "panels", "check_data"):
        if getattr(args, name) and not public and not (pairs and name in ("limit", "pred_dir", "check_data")):
            p.error(f"--{name.replace('_', '-')} belongs to a benchmark, not to --dataset {args.dataset}")
    if args.align != PLAIN and not public and not (pairs and args.pred_dir and args.align == "disparity"):
        p.error(f"--align {args.align} belongs to a benchmark of depth, not to --dataset {args.dataset}")
    if args.dataset == "judge" and not args.scenes:
        p.error("--dataset judge needs --scenes DIR, a folder with ground truth (docs/files.md)")
    if args.dataset == "scenes" and not args.data:
        p.error("--dataset scenes needs --data FOLDER with ID_rgb.png, ID_depth.png, ID_normal.png, ID_albedo.png, "
                "ID_irradiance.png (docs/files.md)")
    return args


def _add_data_flags(p):
    p.add_argument("--dataset", default="", metavar="NAME",
                   choices=(*PROCEDURAL, "scenes", "judge", "da2k", *DATASETS),
                   help="synthetic, broad, wild: procedural test scenes; scenes: a folder with ID_rgb.png, "
                        "ID_depth.png, ID_normal.png, ID_albedo.png, ID_irradiance.png; judge: --judge against the "
                        "ground truth of --scenes; da2k: which of two points is closer, for judges and predictors; "
                        "photos: depth-normal "
                        f"consistency on any folder; benchmarks: {', '.join(DATASETS[:-1])}")
    p.add_argument("--scenes", default="", help="scene folder, or .jsonl of the judge release, of --dataset judge")
    p.add_argument("--split", choices=("all", "train", "val"), default="all",
                   help="rooms of --scenes to ask about; val: those that training holds out [all]")
    p.add_argument("--pairs", type=int, default=8, help="of --dataset judge: questions per scene and modality [8]")
    p.add_argument("--swap-average", action="store_true",
                   help="of --dataset judge: ask with both orders of the colours, take the mean")
    p.add_argument("--text", action="store_true", help="of --dataset judge: a model that answers in text only (slow)")
    p.add_argument("--task", default="",
                   help="of a benchmark that has both: depth, normal [depth]")
    p.add_argument("--data", default="", help="folder of scenes or photos; folder or uncompressed tar of a benchmark")
    p.add_argument("--list-datasets", action="store_true",
                   help="print every data set, its source and licence, and stop")
    p.add_argument("--check-data", action="store_true",
                   help="count and decode the files of a benchmark, name the first bad one, and stop")
    p.add_argument("--limit", type=int, default=0,
                   help="at most this many of the images that are there; the number is partial [0: all]")


def _add_predictor_flags(p):
    p.add_argument("--out", default="out/mini", help="run whose parts are used where no other is named [out/mini]")
    p.add_argument("--checkpoint", default="", help="predictor to evaluate [OUT/grpo]")
    p.add_argument("--compare", default=[], nargs="+", metavar=("BASE", "NEW"),
                   help="predictor (or folder of saved maps) to compare with, or two of them: the base and the new one "
                        "[OUT/base when neither --checkpoint nor --pred-dir is given]")
    p.flip()
    p.add_argument("--pred-dir", default="",
                   help="score saved maps in Marigold's naming, e.g. test/kitchen_0004/pred_0001.npy")
    p.add_argument("--align", default=PLAIN, choices=tuple(ALIGNMENTS),
                   help="how a benchmark's depth is brought to metres: least squares in depth, in disparity (of "
                        "networks and folders of disparities), or RANSAC in log depth; printed with every number "
                        "[depth]")
    p.add_argument("--pred-space", default="", choices=("", "linear", "srgb"),
                   help="colour space of saved albedo and shading [srgb; hypersim: linear]")
    p.add_argument("--judge", default="", help="judge to score on the same pairs [OUT/judge if there]; none: no judge")
    p.add_argument("--images", type=int, default=128, help="test scenes of a procedural set [128]")
    p.add_argument("--size", type=int, default=0,
                   help="px, side of the square images [what the predictor was trained at]")
    p.add_argument("--processing-res", type=int, default=None,
                   help="px, long edge the network sees of a benchmark photo, 0: the photo's own [what it was "
                        "trained at, else the protocol's]")
    p.add_argument("--ensemble-size", type=int, default=1, help="noise draws averaged per benchmark photo [1]")
    p.add_argument("--denoise-steps", type=int, default=None,
                   help="sampling steps [scenes: 10; benchmarks: the model's own, 10 for ours]")
    p.add_argument("--seed", type=int, default=0, help="seed of noise and pairs [0]")
    p.add_argument("--panels", type=int, default=0,
                   help="benchmark images to picture, best and worst first, in OUT/eval/DATASET-TASK.png [0]")
    p.add_argument("--json", default="", help="file for every printed number; an infinite PSNR is the string \"inf\"")


if __name__ == "__main__":
    run_command(main, "eval.py")
