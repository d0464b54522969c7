"""Does GRPO teach a depth network? A tiny Depth Anything on procedural photos, scored on photos it has not seen.

    python -m bench.tune_depth --seeds 0 1 2             every seed, a table, the raw numbers
    python -m bench.tune_depth --seeds 3 --split val     to choose settings
Each seed has a folder of its own. There a DepthAnythingForDepthEstimation (DINOv2, patch 14) first learns disparity
from the true maps of `synthetic` scenes, so that it has something to lose, and is saved as transformers saves it. It is
then tuned as the printed command of train.py does: by GRPO against the oracle judge on procedural `wild` photos, with
no supervised loss. The score is depth pair accuracy on held-out scenes, before and after, with a paired bootstrap over
images. The same command again goes on where it was interrupted.
"""
from pathlib import Path

import torch
import transformers

import train
from bench.measure import kept_figures
from data.pools import scene_pool
from evaluation.intervals import bootstrap_interval, verdict
from evaluation.scores import PAIRS, eval_pairs, predict_maps, score_maps
from models.depth import DepthNetwork
from models.depth_families import find_family
from predictor import load_predictor
from runtime import ranks
from runtime.command import run_command
from runtime.config import plain_settings
from runtime.files import write_json
from runtime.flags import Parser, parse
from runtime.optimizers import cosine, optimizers
from runtime.run import Run, about

SIZE = 56                         # px, side of the photos: 4 x 4 tokens
STREAM = 40                       # of random numbers, which no stage of train.py has
SCENES = 600                      # of supervised training
BATCH = 16
LR = 1e-3                         # of supervised training, cosine
DOMAINS = ("wild", "synthetic")   # that it is tuned on, that it began with
# flags of train.py on top of preset mini. Pairs and samples cost little: the network sees a photo once a group
TUNE = ("--replay 0 --photos 256 --group 32 --pairs 200 --bank-pairs 256 --batch 8 --reward hard --jitter 1 "
        "--noise-blocks 2,4,8 --noise 0.3 --kl-weight 0.02 --lr 1e-3 --eval-every 0")


def tiny_depth_anything(seed, width=64, layers=4):
    """A random DepthAnythingForDepthEstimation for relative depth, about 0.3 M parameters."""
    backbone = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, mlp_ratio=2, image_size=SIZE, patch_size=14,
        out_indices=list(range(1, layers + 1)), apply_layernorm=True, reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=width, patch_size=14, reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[16, 24, 32, 32], fusion_hidden_size=24, head_hidden_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.DepthAnythingForDepthEstimation(config)


def disparity_loss(maps, depth, mask):
    """Mean distance of a map to the disparity that is 1 at the nearest point, 0 in the sky (Depth Anything's labels).

    maps (B, 1, H, W) minus a disparity, as models.depth gives it;  depth (B, 1, H, W) metres;  mask True: valid
    """
    near = depth.masked_fill(~mask, torch.inf).amin((1, 2, 3), keepdim=True)
    return (-maps - (near / depth).where(mask, 0.0)).abs().mean()


def prepare_start(folder, seed, steps):
    """Train a network on true depth of `synthetic` scenes; writes a folder that transformers opens, and resumes."""
    model = tiny_depth_anything(seed)
    model.config.architectures = [type(model).__name__]
    net = DepthNetwork(model, find_family(model.config, folder), {})
    net.begin_training()
    opts = optimizers([net.model], LR, 0, weight_decay=0.01)
    run = Run(folder, dict(steps=steps), seed, steps, dict(network=net.model), opts, save_every=100)
    scenes = scene_pool("synthetic", "train", SCENES, SIZE) if run.has_steps else None
    for step, draw in run.steps("start", stream=STREAM, batch=BATCH):
        maps, run.where = scenes.draw(draw)
        loss = disparity_loss(net.predict(maps["rgb"], "depth"), maps["depth"], maps["mask"])
        norm = run.update(loss, [list(net.model.parameters())], cosine(step, steps, warmup=50))
        run.log(step, {"loss": loss.detach(), "grad/norm": norm}, show=("loss",))
    if run.begin_result("config.json"):
        net.save(folder)


def tuning_words(args, seed):
    """Words of the command of train.py that tunes a seed's network."""
    folder = Path(args.out) / f"seed{seed}"
    return ["--stage", "grpo", "--policy", str(folder / "start"), "--judge", "oracle", "--size", str(SIZE),
            "--seed", str(seed), "--out", str(folder), "--steps", str(args.steps), *TUNE.split(), *args.set]


def pair_accuracy(spec, maps, pairs):
    """Depth pair accuracy of a predictor on scenes: (n,) numpy."""
    pred = predict_maps(load_predictor(spec), maps["rgb"], 1, 0)
    return score_maps(pred, maps, pairs, warn=False)["depth/pairs"]


def run_seed(args, seed):
    """Train, tune and score one seed; writes figures.json in its folder, or reads it. raises UserError."""
    folder = Path(args.out) / f"seed{seed}"
    cfg = parse(tuning_words(args, seed))[1]
    path = folder / f"figures-{args.split}.json"
    key = dict(settings=plain_settings(cfg), start_steps=args.start_steps, images=args.images)
    if path.is_file():
        return kept_figures(path, key)
    device = ranks.setup(cfg)
    prepare_start(folder / "start", seed, args.start_steps)
    train.check_inputs(cfg)
    train.train_grpo(cfg, device)
    figures = dict(seed=seed, key=key, about=about())
    for domain in DOMAINS:
        maps = scene_pool(domain, args.split, args.images, SIZE).all()
        pairs = eval_pairs(maps, PAIRS, 1, 0)
        before, after = (pair_accuracy(spec, maps, pairs) for spec in (cfg.policy, cfg.grpo_folder))
        change, low, high = bootstrap_interval(before, after)
        figures[domain] = dict(before=float(before.mean()), after=float(after.mean()), change=change, low=low,
                               high=high, verdict=verdict(low, high, 1))
    write_json(path, figures)
    return figures


def seeds_table(done):
    """Markdown: a row per seed and domain."""
    lines = ["| held out | seed | before | after | change, 95 % interval | |", "|---" * 6 + "|"]
    for domain in DOMAINS:
        for one in done:
            x = one[domain]
            lines.append(f"| `{domain}` | {one['seed']} | {x['before']:.3f} | {x['after']:.3f} | {x['change']:+.3f} "
                         f"[{x['low']:+.3f}, {x['high']:+.3f}] | {x['verdict']} |")
    return "\n".join(lines)


def arguments(argv):
    """Parse the command line; flags of train.py may follow behind --set."""
    p = Parser(prog="bench.tune_depth", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each has a network of its own [0 1 2]")
    p.add_argument("--split", choices=("test", "val"), default="test",
                   help="scenes that are scored; choose settings on val [test]")
    p.add_argument("--images", type=int, default=256, help="scenes that are scored, per domain [256]")
    p.add_argument("--start-steps", type=int, default=250, help=f"supervised steps of {BATCH} photos before [250]")
    p.add_argument("--steps", type=int, default=60, help="steps of GRPO [60]")
    p.add_argument("--out", default="out/tune_depth", help="folder of everything [out/tune_depth]")
    p.add_argument("--set", nargs="...", default=[], metavar="FLAGS", help="last: further flags of train.py")
    args = p.parse_args(argv)
    p.at_least(args, 1, "images", "start_steps", "steps")
    return args


def main(argv=None):
    """Command line: run what is missing, then the table and the raw numbers."""
    args = arguments(argv)
    print("tuned by: python train.py " + " ".join(tuning_words(args, args.seeds[0])), flush=True)
    done = [run_seed(args, seed) for seed in args.seeds]
    print(f"\ndepth pair accuracy on {args.images} {args.split} scenes, paired bootstrap over images\n"
          + seeds_table(done))
    write_json(Path(args.out) / f"tune_depth-{args.split}.json", dict(about=about(), seeds=done))


if __name__ == "__main__":
    run_command(main, "bench.tune_depth", resumes=True)
