"""Settings of train.py: one dataclass whose comments are the --help text, three presets, one parser.

Order: default (the paper's value where the paper has one) < preset < --estimator < flag.
"""
import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime import files


class UserError(Exception):
    """A mistake the user can mend; commands print it as one line and exit with 2."""


@dataclass
class Config:
    """Every setting of every stage; `base_`, `judge_` belong to their stage, the rest to GRPO or to all."""

    stage: str = "all"               # base (flow matching on synthetic scenes), judge, grpo, or all in this order
    out: str = ""                    # folder of the run; empty: out/PRESET. The same command again resumes
    seed: int = 0                    # everything random derives from it
    device: str = "auto"             # auto, cpu or cuda
    threads: int = 0                 # CPU threads; 0: as torch chooses
    precision: str = "auto"          # of the networks in training: bf16 where the hardware has it (auto), bf16 or fp32
    compile: int = 0                 # 1: torch.compile the predictor in base and GRPO; GRPO keeps a 16-bit copy to act
    kernels: str = "auto"            # auto (Triton on a GPU, torch elsewhere) or torch
    save_every: int = 100            # steps between checkpoints
    keep: int = 2                    # newest checkpoints of a stage that stay on the disk
    deterministic: int = 0           # 1: refuse operations whose result changes from run to run (a GPU; slower)
    detect_anomaly: int = 0          # 1: repeat a step that is not finite under torch's anomaly detection
    fsdp: int = 0                    # 1: GRPO policy, reference and optimizer spread over the processes (FSDP2)
    stop_at: int = 0                 # stop a stage after this many steps as if interrupted; 0: run to its end
    size: int = 512                  # px, side of the square training photos (judge: 512)
    images: str = ""                 # folder of unlabeled photos for GRPO; empty: procedural `wild` ones (paper: COCO)
    policy: str = ""                 # predictor to fine-tune by GRPO; empty: OUT/base (paper: PRISM, Marigold)
    judge: str = ""                  # judge folder or hub id; empty: OUT/judge. Or the model to tune
    scenes: str = ""                 # scene folder (or .jsonl) with ground truth on which a given judge is tuned
    bank: str = ""                   # folder of the judgement bank; empty: OUT/bank
    max_pixels: int = 80_000_000    # photos and maps of more pixels are refused before they are decoded
    eval_images: int = 128           # held-out scenes per domain in tables

    width: int = 768                 # width of the DiT
    encoder_layers: int = 8          # layers of its photo encoder, run once per photo
    layers: int = 8                  # layers of its denoiser, run once per step and sample
    heads: int = 12                  # attention heads of the DiT
    patch: int = 16                  # px, side of a DiT token

    base_scenes: int = 20000         # synthetic scenes in the training pool
    base_steps: int = 50000          # flow-matching steps
    base_batch: int = 64             # photos a step; every photo gives all four modalities
    base_lr: float = 3e-4            # AdamW peak learning rate, cosine
    base_muon: float = 0.0           # Muon learning rate for the matrices; 0: AdamW for everything
    base_ema: float = 0.999          # decay of the averaged weights that are evaluated and kept

    judge_scenes: int = 20000        # broad scenes in the training pool
    judge_steps: int = 20000         # steps, of which the first part trains the vision tower alone
    judge_warm: float = 0.5          # share of the steps that trains the vision tower alone (mini judge; differs)
    judge_batch: int = 16            # marked photos a step, four questions each (judge release: 16)
    judge_lr: float = 4e-5           # AdamW peak learning rate (judge release: 4e-5)
    judge_muon: float = 0.0          # Muon learning rate for the matrices; 0: AdamW for everything (judge release)
    judge_decay: float = 0.01        # weight decay (judge release: 0.01)
    judge_width: int = 1024          # width of a judge that is trained from scratch
    judge_vision_layers: int = 24    # its vision tower
    judge_text_layers: int = 24      # its language model
    judge_heads: int = 16            # its attention heads
    judge_patch: int = 16            # px, side of its vision token
    judge_pairs: int = 2             # tuning: questions per scene and modality, one of each answer (judge release: 1)
    judge_passes: float = 5.0        # tuning: passes over the questions; steps follow (judge release: 5)
    judge_micro: int = 4             # tuning: questions in memory at once; gradients are gathered (judge release: 4)
    judge_rank: int = 16             # tuning: LoRA rank (judge release: 16)
    judge_alpha: float = 32.0        # tuning: LoRA alpha (judge release: 32)
    judge_dropout: float = 0.05      # tuning: LoRA dropout (judge release: 0.05)
    judge_warmup: float = 0.03       # tuning: share of the steps with a rising learning rate (judge release: 0.03)

    photos: int = 10000              # photos used by GRPO (paper: 10000 of COCO train)
    pairs: int = 40                  # N, point pairs drawn per photo and step (paper: 40)
    bank_pairs: int = 40             # pairs judged per photo in all, from which `pairs` are drawn
    group: int = 8                   # G, samples per photo (paper: 8)
    sample_steps: int = 15           # T, denoising steps in training (paper: 15)
    eval_steps: int = 50             # denoising steps in evaluation (paper: 50)
    noise: float = 0.7               # a of the exploration noise, or eta for ddim (paper: 0.7)
    noise_blocks: str = "1"          # px, squares that share noise, a size drawn per row (albedo: 1); 1: white (paper)
    exploration: str = "flow"        # flow (Flow-GRPO, paper), ddim (eta form); auto: the predictor's own (ours: flow)
    init_noise: str = "shared"       # a group starts from shared or independent noise (the paper does not say which)
    rollout: str = "full"            # full: every step but the last stochastic (paper); branch: one; window: a few
    stochastic: int = 2              # K, stochastic steps in a row when the rollout is a window
    tail: int = 0                    # steps from the last stochastic state to the map; 0: all left of sample_steps
    credit: str = "global"           # global: one advantage per sample (paper); pair: around a pair's points
    credit_width: float = 1.0        # px of the state, width of the splat around a point
    reward: str = "hard"             # hard (paper), confidence: relation; soft, brier: tanh(margin/tau) against 2p-1
    jitter: int = 1                  # px, side of the square around a judged point in which the map is read (paper: 1)
    dead_zone: str = "half"          # hard, confidence: a map's answer in the dead zone counts one half, or skip: not
    window: int = 0                  # px, radius of the mean read at a point (paper: 0, one pixel)
    modalities: str = "one"          # one drawn per step (paper), or joint: all four at every step
    balance: int = 0                 # 1: both answers to the albedo question carry half of the reward (paper: 0)
    depth_normal: float = 0.0        # weight of the depth-normal consistency reward, no judge; wants joint (paper: 0)
    shading: float = 0.0             # weight of albedo x irradiance against the photo, no judge; wants joint (paper: 0)
    norm: str = "group"              # advantage scale: group (paper), global or none
    steps: int = 5000                # GRPO steps (paper: 3 epochs of 10000 photos at 6 a step)
    batch: int = 6                   # photos a step over all ranks (paper: 6 GPUs, one each)
    updates: int = 1                 # optimiser updates per rollout; with 1 the clip never acts
    clip: float = 1e-4               # clip range of the ratio; likelihoods are means over elements
    kl_weight: float = 0.04          # beta, weight of the closed-form KL to the frozen start
    replay: float = 0.0              # weight of the supervised flow loss on synthetic scenes (paper: 0)
    lr: float = 1e-5                 # AdamW peak learning rate, cosine (paper: 1e-5)
    lora: int = 0                    # rank (= alpha) of adapters on the attention layers; 0: all weights train (paper)
    checkpointing: int = 0           # 1: recompute activations in the backward pass: less memory, a third more time
    micro: int = 0                   # states the predictor takes at once, in rollout and update alike; 0: all
    ema: float = 0.99                # decay of the averaged policy that is evaluated and kept
    eval_every: int = 100            # steps between diagnostics on validation scenes; 0: never
    val_images: int = 24             # validation scenes per domain in the diagnostics
    band: float = 4.0                # at evaluations: stop if sharpness or spread have changed by this factor; 0: never
    forget: float = 0.5              # at evaluations: stop if a synthetic error has grown by this share; 0: never

    @property
    def start(self):
        """Folder or hub id of the predictor that GRPO starts from."""
        return self.policy or Path(self.out) / "base"

    @property
    def grpo_folder(self):
        """Where GRPO keeps its run: OUT/grpo, or OUT/photos for the user's own photos."""
        return Path(self.out) / ("photos" if self.images else "grpo")

    @property
    def noisy_steps(self):
        """K, number of noisy steps of a rollout."""
        return dict(full=self.sample_steps - 1, branch=1, window=self.stochastic)[self.rollout]


# --estimator: how rewards become a gradient. credit_width, KL, clip, replay, EMA, lr, T, N and G stay the preset's, and
# so does the jitter under `pair`, which is the side of a judge's token
ESTIMATORS = {
    "paper": dict(credit="global", rollout="full", tail=0, noise_blocks="1", reward="hard", norm="group",
                  modalities="one", balance=0, jitter=1, window=0, depth_normal=0.0, shading=0.0, exploration="flow"),
    "pair": dict(credit="pair", rollout="branch", tail=1, noise_blocks="1,2,4,8", reward="brier", norm="global",
                 modalities="joint", balance=1, window=0, depth_normal=0.0, shading=0.0, exploration="auto"),
}
PRESETS = {
    # 2 CPU cores, procedural scenes, everything trained from scratch
    "mini": dict(
        size=32, width=128, encoder_layers=4, layers=3, heads=4, patch=4, eval_steps=10,
        base_scenes=8000, base_steps=750, base_batch=32, base_lr=1e-3, base_muon=2e-3, base_ema=0.995,
        judge_scenes=30000, judge_steps=2200, judge_warm=0.25, judge_batch=64, judge_lr=1e-3, judge_muon=4e-3,
        judge_decay=0.02, judge_width=128, judge_vision_layers=5, judge_text_layers=2, judge_heads=4, judge_patch=4,
        photos=384, pairs=48, bank_pairs=64, sample_steps=8, jitter=4, steps=200, batch=8, clip=0.1, kl_weight=0.1,
        replay=0.2, lr=3e-4, ema=0.98, **ESTIMATORS["pair"]),
    # one GPU, procedural scenes at 128 px: about a quarter of an hour of an H100 by arithmetic (bench/RESULTS.md)
    "small": dict(
        size=128, width=384, encoder_layers=6, layers=4, heads=6, patch=8, eval_steps=10, save_every=1000,
        base_scenes=20000, base_steps=6000, base_batch=64, base_lr=6e-4, base_muon=1e-3,
        judge_scenes=60000, judge_steps=10000, judge_batch=128, judge_lr=5e-4, judge_muon=1e-3, judge_decay=0.02,
        judge_width=384, judge_vision_layers=8, judge_text_layers=4, judge_heads=6, judge_patch=8,
        photos=4000, pairs=64, bank_pairs=128, sample_steps=10, credit_width=4.0, jitter=8, steps=2000, batch=16,
        clip=0.1, kl_weight=0.1, replay=0.2, lr=1e-4, ema=0.99, **ESTIMATORS["pair"]),
    # the paper's numbers; needs weights and photos: `problem` names them
    "paper": {},
}
CHOICES = {
    "stage": ("all", "base", "judge", "grpo"), "device": ("auto", "cpu", "cuda"), "kernels": ("auto", "torch"),
    "precision": ("auto", "bf16", "fp32"),
    "exploration": ("auto", "flow", "ddim"), "credit": ("global", "pair"),
    "rollout": ("full", "branch", "window"),
    "init_noise": ("shared", "independent"),
    "reward": ("hard", "soft", "confidence", "brier"), "dead_zone": ("half", "skip"), "modalities": ("one", "joint"),
    "norm": ("group", "global", "none"),
}


# what may change when a run resumes: places, what is saved and watched, what costs memory or time but no number
FREE = ("stage", "out", "device", "threads", "kernels", "save_every", "keep", "deterministic", "detect_anomaly", "fsdp",
        "stop_at", "bank", "max_pixels", "eval_images", "checkpointing", "micro", "eval_every", "val_images", "band",
        "forget")
NETWORK = ("width", "encoder_layers", "layers", "heads", "patch")                         # of the DiT
SWITCHES = ("compile", "deterministic", "detect_anomaly", "fsdp")                         # --NAME alone is --NAME 1
MAY_BE_ZERO = ("seed", "threads", "stop_at", "base_muon", "judge_muon", "judge_warm", "judge_decay", "judge_dropout",
               "judge_warmup", "tail", "window", "depth_normal", "shading",
               "balance", "lora", "checkpointing", "micro", "kl_weight", "replay", "ema", "base_ema", "eval_every",
               "band", "forget", *SWITCHES)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2."""

    def error(self, message):
        if os.environ.get("LOCAL_RANK", "0") == "0":                            # once, not once a process
            print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)

    def limits(self):
        """Add the flags of a command that reads pictures."""
        self.add_argument("--max-pixels", type=int, default=files.PIXELS,
                          help=f"refuse a photo or map of more pixels before it is decoded [{files.PIXELS}]")

    def parse_args(self, *args):
        """As ArgumentParser's; the limit on pictures is set."""
        found = super().parse_args(*args)
        if (most := getattr(found, "max_pixels", None)) is not None:
            if most < 1:
                self.error(f"--max-pixels {most}: want at least 1")
            files.set_max_pixels(most)
        return found

    def at_least(self, args, least, *names):
        """Refuse a flag below a bound; one that was not given (None) passes."""
        for name in names:
            value = getattr(args, name)
            if value is not None and value < least:
                self.error(f"--{name.replace('_', '-')} {value}: want at least {least}")


def parse(argv=None):
    """Build a Config: defaults < preset < estimator < flags; returns (preset, Config, dry_run). Exits 2 on an error."""
    text = dict(re.findall(r"^\s+(\w+): \w+ = [^#\n]*#\s*(.+)$", inspect.getsource(Config), re.M))
    p = Parser(prog="train.py", allow_abbrev=False, description=__doc__.splitlines()[0],
               formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110))
    p.add_argument("--preset", choices=list(PRESETS), default="mini",
                   help="mini: 2 CPU cores; small: one GPU, 128 px; paper: the paper's numbers [mini]")
    p.add_argument("--estimator", choices=list(ESTIMATORS), default=None,
                   help="paper: one advantage per sample, every step noisy, hard reward, one modality a step, flow "
                        "exploration; pair: credit at the pairs' points, one noisy step, Brier reward [the preset's]")
    p.add_argument("--dry-run", action="store_true", help="print the settings and the batch arithmetic, then stop")
    for f in dataclasses.fields(Config):
        p.add_argument("--" + f.name.replace("_", "-"), type=f.type, choices=CHOICES.get(f.name),
                       **(dict(nargs="?", const=1) if f.name in SWITCHES else {}),
                       metavar=f.type.__name__.upper() if f.name not in CHOICES else None, default=argparse.SUPPRESS,
                       help=f"{text[f.name]} [{f.default}]".replace("%", "%%"))
    flags = vars(p.parse_args(argv))
    preset = flags.pop("preset")
    dry_run = flags.pop("dry_run")
    estimator = ESTIMATORS.get(flags.pop("estimator"), {})
    cfg = dataclasses.replace(Config(), **{**PRESETS[preset], **estimator, **flags})
    cfg.out = cfg.out or f"out/{preset}"
    wrong = problem(cfg, preset)
    if wrong:
        p.error(wrong)
    files.set_max_pixels(cfg.max_pixels)
    return preset, cfg, dry_run


def stage_settings(cfg, stage, *names):
    """The settings that a run of stage "base" or "judge" may not change when it resumes: dict name -> value."""
    return {k: v for k, v in dataclasses.asdict(cfg).items()
            if k in ("precision", *names) or k.startswith(f"{stage}_")}


def grpo_settings(cfg):
    """The same for a run of stage grpo: all settings but FREE, those of the networks, and those of other stages."""
    others = ("base_", "judge_")
    return {k: v for k, v in dataclasses.asdict(cfg).items()
            if k == "base_scenes" or k not in (*FREE, *NETWORK, "scenes") and not k.startswith(others)}


def plan(preset, cfg):
    """The settings and the batch arithmetic, as text (--dry-run)."""
    rows = cfg.batch * (4 if cfg.modalities == "joint" else 1)
    judge = f"{cfg.judge_steps} steps x {cfg.judge_batch} marked photos x 4 questions"
    if cfg.scenes:
        judge = (f"LoRA on {cfg.judge}, {cfg.judge_passes:g} passes over {cfg.judge_pairs} x 4 questions a scene, "
                 f"{cfg.judge_batch} a step, {cfg.judge_micro} in memory")
    return "\n".join((
        json.dumps(dict(preset=preset, **dataclasses.asdict(cfg)), indent=1),
        f"base: {cfg.base_steps} steps x {cfg.base_batch} photos x 4 modalities",
        f"judge: {judge}",
        f"bank: {cfg.photos} photos x {cfg.bank_pairs} pairs x 4 questions, asked once",
        f"grpo: {cfg.steps} steps x {rows} rows x {cfg.group} samples = {cfg.steps * rows * cfg.group} samples, "
        f"{cfg.pairs} pairs each; {cfg.steps * cfg.batch / cfg.photos:.1f} epochs"))


def problem(cfg, preset="mini"):
    """First thing wrong with the settings, found before any model is built; None when they add up."""
    if cfg.stage == "judge" and (bool(cfg.judge) != bool(cfg.scenes) or preset == "paper" and not cfg.scenes):
        return ("--stage judge tunes a judge with both --judge MODEL (OpenGVLab/InternVL2_5-4B) and --scenes DIR "
                "(HyperSim, InteriorVerse: see data/prepare.py), or trains a small one with neither (--preset mini)")
    if cfg.scenes and cfg.stage != "judge":
        return f"--scenes {cfg.scenes} with --stage {cfg.stage}: only --stage judge reads scenes"
    if preset == "paper" and cfg.stage != "judge" and not (
            cfg.stage == "grpo" and cfg.policy and cfg.judge and cfg.images):
        return ("--preset paper fine-tunes published weights: want --stage grpo, "
                "--policy FOLDER (prs-eth/marigold-iid-lighting-v1-1), "
                "--judge FOLDER (adirik/InternVL2_5-4B-Intrinsic-Judge) and "
                "--images FOLDER (10000 photos of COCO train2017); "
                "use --preset mini to run without any")
    if cfg.fsdp and cfg.stage not in ("grpo", "all"):
        return f"--fsdp 1 with --stage {cfg.stage}: it spreads the policy of --stage grpo"
    if cfg.fsdp and cfg.compile:
        return "--fsdp 1 with --compile 1: weights that are spread are gathered layer by layer, which is not compiled"
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and not value > 0 and f.name not in MAY_BE_ZERO:
            return f"--{f.name.replace('_', '-')} {value}: want more than 0"
        if f.type in (int, float) and value < 0:
            return f"--{f.name.replace('_', '-')} {value}: want at least 0"
    if cfg.scenes and cfg.judge_batch % cfg.judge_micro:
        return f"--judge-batch {cfg.judge_batch} is not a multiple of --judge-micro {cfg.judge_micro}"
    if cfg.group < 2:
        return f"--group {cfg.group}: a group of one has no advantage; want at least 2"
    if cfg.sample_steps < 2:
        return f"--sample-steps {cfg.sample_steps}: the last step is deterministic; want at least 2"
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.noise_blocks):
        return f"--noise-blocks {cfg.noise_blocks!r}: want sizes in px between commas, such as 1,2,4"
    if cfg.rollout == "window" and cfg.stochastic >= cfg.sample_steps:
        return f"--stochastic {cfg.stochastic} of --sample-steps {cfg.sample_steps}: the last step is deterministic"
    if (cfg.depth_normal or cfg.shading) and cfg.modalities != "joint":
        return "--depth-normal and --shading hold two maps of a photo against each other: want --modalities joint"
    if cfg.images and cfg.judge == "oracle":
        return f"--images {cfg.images} has no true maps for --judge oracle; use procedural photos"
    if 0 < cfg.band <= 1:
        return f"--band {cfg.band}: want a factor above 1, or 0"
    for name, given in (("patch", cfg.policy), ("judge_patch", cfg.judge)):     # of networks that are built here
        if not given and not cfg.scenes and cfg.size % getattr(cfg, name):
            return f"--size {cfg.size} is not a multiple of --{name.replace('_', '-')} {getattr(cfg, name)}"
    if cfg.width % (4 * cfg.heads) or cfg.judge_width % (4 * cfg.judge_heads):
        return f"--width {cfg.width} / --judge-width {cfg.judge_width}: want a multiple of 4 x heads"
    if cfg.pairs > cfg.bank_pairs:
        return f"--pairs {cfg.pairs} drawn of --bank-pairs {cfg.bank_pairs} judged; want at most as many"
    return None
