"""Settings of train.py: dataclasses whose comments are the --help text, four presets, two estimators.

Order: default (the paper's value where the paper has one) < preset < --estimator < flag. A group of settings is a
class; `fixed` says whether its settings change results, so that a run may not resume with others.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin

MICRO = 4                            # questions in memory at once while a judge is tuned (judge release: 4)


class UserError(Exception):
    """A mistake the user can mend; commands print it as one line and exit with 2."""


@dataclass(frozen=True)
class Bound:
    """Least value of a number; open: the value itself is not allowed."""

    least: float
    open: bool = False

    def problem(self, value):
        """What is wrong with a value, or ""."""
        good = value > self.least if self.open else value >= self.least         # NaN is neither
        return "" if good else f"want {'more than' if self.open else 'at least'} {self.least:g}"


Count = Annotated[int, Bound(1)]
Several = Annotated[int, Bound(2)]
Natural = Annotated[int, Bound(0)]
Positive = Annotated[float, Bound(0, open=True)]
Weight = Annotated[float, Bound(0)]
Sizes = tuple[Count, ...]


@dataclass
class WhatToRun:
    """What to run"""

    fixed: ClassVar = False
    stage: Literal["all", "base", "judge", "grpo"] = "all"  # base (flow matching on synthetic scenes), judge, grpo; all
    out: str = ""                    # folder of the run; empty: out/PRESET. The same command again resumes
    device: Literal["auto", "cpu", "cuda"] = "auto"         # where; processes: torchrun, CPU threads: OMP_NUM_THREADS


@dataclass
class WhatToLearnFrom:
    """What to learn from"""

    fixed: ClassVar = True
    seed: Natural = 0                # everything random derives from it
    images: str = ""                 # folder of unlabeled photos for GRPO; empty: procedural ones (paper: COCO)
    policy: str = ""                 # SPEC of the predictor to tune; empty: OUT/base (paper: PRISM, Marigold)
    judge: str = ""                  # SPEC of the judge (maps:DIR, http://... too), or model to tune; empty: OUT/judge
    both_orders: bool = False        # ask the judge twice, colours exchanged: the mean counts, the difference is told
    size: Natural = 512              # px, side of the square training photos (judge: 512); 0: what --policy is made for
    photos: Count = 10000            # most photos that GRPO trains on (paper: 10000 of COCO train)
    base_scenes: Count = 20000       # synthetic scenes of the base stage and of --replay


@dataclass
class Method:
    """The method, with the paper's letters and values"""

    fixed: ClassVar = True
    group: Several = 8               # G, samples per photo (paper: 8)
    pairs: Count = 40                # N, point pairs drawn per photo and step (paper: 40)
    bank_pairs: Count = 40           # pairs judged per photo in all, from which `pairs` are drawn
    sample_steps: Several = 15       # T, denoising steps in training (paper: 15)
    eval_steps: Count = 50           # denoising steps in evaluation (paper: 50)
    noise: Positive = 0.7            # a of the exploration noise; eta for ddim, std for a one-step network (paper: 0.7)
    clip: Positive = 1e-4            # epsilon, clip range of the ratio; likelihoods are means over elements
    kl_weight: Weight = 0.04         # beta, weight of the closed-form KL to the frozen start
    lr: Positive = 1e-5              # AdamW peak learning rate, cosine (paper: 1e-5)
    steps: Count = 5000              # GRPO steps (paper: 3 epochs of 10000 photos at 6 a step)
    batch: Count = 6                 # photos a step over all processes (paper: 6 GPUs, one each)
    updates: Count = 1               # optimiser updates per rollout; with 1 the clip never acts


@dataclass
class Departures:
    """Departures from the method; the default is the paper's form"""

    fixed: ClassVar = True
    credit: Literal["global", "pair"] = "global"            # one advantage per sample, or around a pair's points
    rollout: str = "full"            # noisy steps: full (all but the last), branch (one), or so many in a row
    tail: Natural = 0                # steps from the last noisy state to the map; 0: all left of sample_steps
    noise_blocks: Sizes = (1,)       # px, squares that share noise, a size drawn per row; 1: white
    exploration: Literal["auto", "flow", "ddim"] = "flow"   # Flow-GRPO, DDIM's eta form, or the predictor's own
    reward: Literal["hard", "soft", "confidence", "brier"] = "hard"     # relation, or tanh(margin / tau); 2p - 1
    dead_zone: Literal["half", "skip"] = "half"             # a map's answer in the dead zone counts one half, or not
    norm: Literal["group", "global", "none"] = "group"      # scale of the advantage
    modalities: Literal["one", "joint"] = "one"             # one drawn per step, or all at every step
    balance: bool = False            # both answers to a yes/no question carry half of the reward
    jitter: Natural = 1              # px of the judge, square round a judged point where maps are read; 0: its cell
    replay: Weight = 0.0             # weight of the supervised loss on synthetic scenes
    ema: Weight = 0.99               # decay of the averaged policy that is evaluated and kept
    lora: Natural = 0                # rank (= alpha) of adapters on the attention layers; 0: all weights train


@dataclass
class BasePredictor:
    """The base predictor: our DiT and its training"""

    fixed: ClassVar = True
    width: Count = 768               # width of the DiT
    encoder_layers: Count = 8        # layers of its photo encoder, run once per photo
    layers: Count = 8                # layers of its denoiser, run once per step and sample
    heads: Count = 12                # attention heads
    patch: Count = 16                # px, side of a token
    base_steps: Count = 50000        # flow-matching steps
    base_batch: Count = 64           # photos a step; every photo gives all modalities
    base_lr: Positive = 3e-4         # AdamW peak learning rate, cosine
    base_ema: Weight = 0.999         # decay of the averaged weights that are evaluated and kept


@dataclass
class JudgeFromScratch:
    """The judge, trained from scratch on broad scenes"""

    fixed: ClassVar = True
    judge_width: Count = 1024        # width
    judge_vision_layers: Count = 24  # layers of its vision tower
    judge_text_layers: Count = 24    # layers of its language model
    judge_heads: Count = 16          # attention heads
    judge_patch: Count = 16          # px, side of a vision token
    judge_scenes: Count = 20000      # broad scenes in the training pool
    judge_steps: Count = 20000       # steps, of which the first part trains the vision tower alone
    judge_warm: Weight = 0.5         # that part's share
    judge_batch: Count = 16          # marked photos a step, all questions each; tuning: questions (judge release: 16)
    judge_lr: Positive = 4e-5        # AdamW peak learning rate (judge release: 4e-5)


@dataclass
class JudgeByTuning:
    """The judge, tuned by LoRA (rank 16, as the judge release) on --scenes"""

    fixed: ClassVar = True
    scenes: str = ""                 # scene folder (or .jsonl) with ground truth on which --judge is tuned
    judge_passes: Positive = 5.0     # passes over the questions; steps follow (judge release: 5)


@dataclass
class Arithmetic:
    """Arithmetic, which changes results"""

    fixed: ClassVar = True
    precision: Literal["auto", "bf16", "fp32"] = "auto"     # of networks in training: bf16 where the hardware has it
    compile: bool = False            # torch.compile the predictor; GRPO keeps a 16-bit copy to act
    muon: bool = False               # networks trained from scratch: Muon for hidden matrices, else AdamW


@dataclass
class Memory:
    """Memory and speed"""

    fixed: ClassVar = False
    micro: Natural = 0               # states (tuning a judge: questions) in memory at once; 0: all (tuning: 4)
    checkpointing: bool = False      # recompute activations in the backward pass: less memory, a third more time
    fsdp: bool = False               # GRPO policy, reference and optimizer spread over the processes (FSDP2)
    kernels: Literal["auto", "torch"] = "auto"              # Triton kernels on a GPU, or torch everywhere
    deterministic: bool = False      # refuse operations whose result changes from run to run (a GPU; slower)


@dataclass
class Saving:
    """Saving and watching"""

    fixed: ClassVar = False
    bank: str = ""                   # folder of the judgement bank; empty: OUT/bank
    save_every: Count = 100          # steps between checkpoints
    eval_every: Natural = 100        # steps between figures on validation scenes; 0: never
    eval_images: Count = 128         # held-out scenes per domain in tables; most held-out photos
    band: Weight = 4.0               # at evaluations: stop if sharpness or spread have changed by this factor; 0: never
    forget: Weight = 0.5             # at evaluations: stop if a held-out error has grown by this share; 0: never
    detect_anomaly: bool = False     # repeat a step that is not finite under torch's anomaly detection
    stop_at: Natural = 0             # stop a stage after this many steps as if interrupted; 0: run to its end


@dataclass
class Config(WhatToRun, WhatToLearnFrom, Method, Departures, BasePredictor, JudgeFromScratch, JudgeByTuning, Arithmetic,
             Memory, Saving):
    """Every setting of every stage."""

    @property
    def start(self):
        """SPEC of the predictor that GRPO starts from."""
        return self.policy or Path(self.out) / "base"

    @property
    def grpo_folder(self):
        """Where GRPO keeps its run: OUT/grpo, or OUT/photos for the user's own photos."""
        return Path(self.out) / ("photos" if self.images else "grpo")

    @property
    def noisy_steps(self):
        """K, number of noisy steps of a rollout."""
        return dict(full=self.sample_steps - 1, branch=1)[self.rollout] if self.rollout.isalpha() else int(self.rollout)


GROUPS = Config.__bases__
# --estimator: how rewards become a gradient. KL, clip, replay, EMA, lr, T, N and G stay the preset's, and so does the
# jitter under `pair`, which is the side of a judge's token
ESTIMATORS = {
    "paper": dict(credit="global", rollout="full", tail=0, noise_blocks=(1,), reward="hard", norm="group",
                  modalities="one", balance=False, jitter=1, exploration="flow"),
    "pair": dict(credit="pair", rollout="branch", tail=1, noise_blocks=(1, 2, 4, 8), reward="brier", norm="global",
                 modalities="joint", balance=True, exploration="auto"),
}
PRESETS = {
    # 2 CPU cores, procedural scenes, everything trained from scratch
    "mini": dict(
        size=32, width=128, encoder_layers=4, layers=3, heads=4, patch=4, eval_steps=10, muon=True,
        base_scenes=8000, base_steps=750, base_batch=32, base_lr=1e-3, base_ema=0.995,
        judge_scenes=30000, judge_steps=2200, judge_warm=0.25, judge_batch=64, judge_lr=1e-3, judge_width=128,
        judge_vision_layers=5, judge_text_layers=2, judge_heads=4, judge_patch=4,
        photos=384, pairs=48, bank_pairs=64, sample_steps=8, jitter=4, steps=200, batch=8, clip=0.1, kl_weight=0.1,
        replay=0.2, lr=3e-4, ema=0.98, **ESTIMATORS["pair"]),
    # one GPU, procedural scenes at 128 px: about a quarter of an hour of an H100 by arithmetic (bench/RESULTS.md)
    "small": dict(
        size=128, width=384, encoder_layers=6, layers=4, heads=6, patch=8, eval_steps=10, muon=True, save_every=1000,
        base_scenes=20000, base_steps=6000, base_batch=64, base_lr=6e-4,
        judge_scenes=60000, judge_steps=10000, judge_batch=128, judge_lr=5e-4, judge_width=384,
        judge_vision_layers=8, judge_text_layers=4, judge_heads=6, judge_patch=8,
        photos=4000, pairs=64, bank_pairs=128, sample_steps=10, jitter=8, steps=2000, batch=16,
        clip=0.1, kl_weight=0.1, replay=0.2, lr=1e-4, ema=0.99, **ESTIMATORS["pair"]),
    # the paper's numbers; needs weights and photos: `problem` names them
    "paper": dict(save_every=1000, **ESTIMATORS["paper"]),                      # a checkpoint of Marigold has 14 GB
    # a network that somebody has, on photos that somebody has: sizes, modalities and cells are the networks'. Maps are
    # larger than those of `mini`, so the estimator's squares are too: on 224 px twice as much is learnt (docs/runs.md)
    "tune": dict(
        size=0, photos=1000, pairs=48, bank_pairs=64, sample_steps=8, eval_steps=10, jitter=0, steps=200, batch=8,
        clip=0.1, kl_weight=0.1, lr=1e-5, ema=0.98, micro=4, eval_every=20, save_every=20,
        **ESTIMATORS["pair"] | dict(noise_blocks=(4, 8, 16, 32))),
}


def setting_type(field):
    """(type, choices, bound) of a field; of a tuple's items."""
    kind, choices, bound = field.type, None, None
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    if get_origin(kind) is Annotated:
        kind, bound = get_args(kind)
    return kind, choices, bound


# what a run may not change when it resumes: groups, and further settings by name. GRPO keeps the digests of the
# networks that it starts from, so the settings of their training are free
OTHERS = (BasePredictor, JudgeFromScratch, JudgeByTuning)
KEPT = {
    "base": ((BasePredictor, Arithmetic), ("size", "base_scenes")),
    "judge": ((JudgeFromScratch,), ("size", "precision", "muon")),
    "tuned judge": ((JudgeByTuning,), ("size", "precision", "judge", "judge_batch", "judge_lr")),
    "grpo": (tuple(g for g in GROUPS if g.fixed and g not in OTHERS), ()),
}


def fixed_settings(cfg, stage):
    """The settings that a run of a stage (a key of KEPT) may not change when it resumes: dict name -> value of JSON."""
    groups, names = KEPT[stage]
    kept = {f.name for group in groups for f in dataclasses.fields(group)} | set(names)
    return {k: v for k, v in plain_settings(cfg).items() if k in kept}


def plain_settings(cfg):
    """All settings as JSON gives them back: dict name -> value, tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}


def default_preset(flags):
    """The preset of a command that names none: `tune` for a network, a judge and photos of the user's, else `mini`."""
    given = flags.get("stage") == "grpo" and all(flags.get(name) for name in ("policy", "judge", "images"))
    return "tune" if given else "mini"


def plan(preset, cfg):
    """The settings and the batch arithmetic, as text (--dry-run)."""
    is_tune = preset == "tune"                                                  # the network is not opened here
    rows = cfg.batch * (4 if cfg.modalities == "joint" and not is_tune else 1)
    judge = f"{cfg.judge_steps} steps x {cfg.judge_batch} marked photos x 4 questions"
    if cfg.scenes:
        judge = (f"LoRA on {cfg.judge}, {cfg.judge_passes:g} passes over its questions, {cfg.judge_batch} a step, "
                 f"{cfg.micro or MICRO} in memory")
    before = (f"base: {cfg.base_steps} steps x {cfg.base_batch} photos x 4 modalities", f"judge: {judge}")
    each = " for each modality of the network" if is_tune else ""
    return "\n".join((
        json.dumps(dict(preset=preset, **plain_settings(cfg)), indent=1),
        *(() if is_tune else before),
        f"bank: {'at most ' * is_tune}{cfg.photos} photos x {cfg.bank_pairs} pairs{each or ' x 4 questions'}, "
        "asked once",
        f"grpo: {cfg.steps} steps x {rows} rows x {cfg.group} samples = {cfg.steps * rows * cfg.group} samples{each}, "
        f"{cfg.pairs} pairs each; {cfg.steps * cfg.batch / cfg.photos:.1f} epochs"))


def flag_of(name):
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def value_problem(cfg):
    """First setting whose value is outside its bound, as text; "" when there is none."""
    for f in dataclasses.fields(cfg):
        _, _, bound = setting_type(f)
        values = getattr(cfg, f.name)
        for value in values if isinstance(values, tuple) else (values,):
            if bound and bound.problem(value):
                return f"{flag_of(f.name)} {value}: {bound.problem(value)}"
    return ""


def problem(cfg, preset="mini"):
    """First thing wrong with the settings, found before any model is built; None when they add up."""
    return stage_problem(cfg, preset) or value_problem(cfg) or sum_problem(cfg) or None


def stage_problem(cfg, preset):
    """What is wrong with the stage and what it is given, as text or ""."""
    if cfg.stage == "judge" and (bool(cfg.judge) != bool(cfg.scenes) or preset == "paper" and not cfg.scenes):
        return ("--stage judge tunes a judge with both --judge MODEL (OpenGVLab/InternVL2_5-4B) and --scenes DIR "
                "(HyperSim, InteriorVerse: see data/prepare.py), or trains a small one with neither (--preset mini)")
    if cfg.scenes and cfg.stage != "judge":
        return f"--scenes {cfg.scenes} with --stage {cfg.stage}: only --stage judge reads scenes"
    is_whole = cfg.stage == "grpo" and cfg.policy and cfg.judge
    if preset == "tune" and not (is_whole and cfg.images):
        return ("--preset tune tunes a network on photos: want --stage grpo, --policy SPEC, --judge SPEC and "
                "--images FOLDER")
    if not cfg.size and not is_whole:
        return f"--size 0 with --stage {cfg.stage}: want --stage grpo, --policy and --judge, which have their own sizes"
    if preset == "paper" and cfg.stage != "judge" and not (is_whole and cfg.images):
        return ("--preset paper fine-tunes published weights: want --stage grpo, "
                "--policy FOLDER (prs-eth/marigold-iid-lighting-v1-1), "
                "--judge FOLDER (adirik/InternVL2_5-4B-Intrinsic-Judge) and "
                "--images FOLDER (10000 photos of COCO train2017); "
                "use --preset mini to run without any")
    if cfg.fsdp and cfg.stage not in ("grpo", "all"):
        return f"--fsdp with --stage {cfg.stage}: it spreads the policy of --stage grpo"
    if cfg.fsdp and cfg.compile:
        return "--fsdp with --compile: weights that are spread are gathered layer by layer, which is not compiled"
    if cfg.images and cfg.judge == "oracle":
        return f"--images {cfg.images} has no true maps for --judge oracle; use procedural photos"
    if cfg.both_orders and cfg.judge == "oracle":
        return "--both-orders with --judge oracle: it prefers no colour; leave one of them out"
    return ""


def sum_problem(cfg):
    """What does not add up among the numbers, as text or ""."""
    if cfg.scenes and cfg.judge_batch % (cfg.micro or MICRO):
        return f"--judge-batch {cfg.judge_batch} is not a multiple of --micro {cfg.micro or MICRO}"
    if cfg.rollout not in ("full", "branch") and not cfg.rollout.isdigit():
        return f"--rollout {cfg.rollout}: want full, branch, or a number of noisy steps"
    if not 0 < cfg.noisy_steps < cfg.sample_steps:
        return (f"--rollout {cfg.rollout} of --sample-steps {cfg.sample_steps}: want at least one noisy step, and the "
                "last step is deterministic")
    if 0 < cfg.band <= 1:
        return f"--band {cfg.band}: want a factor above 1, or 0"
    for name, given in (("patch", cfg.policy), ("judge_patch", cfg.judge)):     # of networks that are built here
        if not given and not cfg.scenes and cfg.size % getattr(cfg, name):
            return f"--size {cfg.size} is not a multiple of {flag_of(name)} {getattr(cfg, name)}"
    if cfg.width % (4 * cfg.heads) or cfg.judge_width % (4 * cfg.judge_heads):
        return f"--width {cfg.width} / --judge-width {cfg.judge_width}: want a multiple of 4 x heads"
    if cfg.pairs > cfg.bank_pairs:
        return f"--pairs {cfg.pairs} drawn of --bank-pairs {cfg.bank_pairs} judged; want at most as many"
    return ""
