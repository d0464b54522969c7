"""Train: `--stage base` (flow matching), `--stage judge`, `--stage grpo`, or all three and a before/after table.

    python train.py                                      preset mini: 2 CPU cores, no downloads
    python train.py --stage grpo --images DIR            GRPO on your own photos
    python train.py --stage grpo --policy NET --judge J --images DIR    the same for a network of yours (preset tune)
    python train.py --stage judge --scenes DIR --judge MODEL    LoRA on a published judge, from ground truth
    torchrun --nproc_per_node=8 train.py --stage grpo    a share of the photos on each process

Each stage is one loop; the same command again resumes. A group stays on one rank.
"""
import functools
import math
from dataclasses import replace
from pathlib import Path

import torch

import grpo
import kernels
from data import questions
from data.album import check_count, held_out_digest, judgements, read_album
from data.oracle import ORACLE
from data.photos import read_first_rgb
from data.pools import ScenePool, list_scenes, scene_pool
from evaluation import report
from evaluation.watch import Watch, reward_statistics
from judge import build_mini_judge, load_judge, open_judge
from models import lora
from models.copies import Networks, average_decay, compile_velocity, frozen_copy, trained_part, update_average
from models.dit import DiT, DiTConfig, flow_loss
from models.finetune import WARMUP, add_lora, tuning_batches, tuning_gradient
from models.mini_judge import MiniSizes, Probe, judge_loss
from predictor import load_predictor
from relations import NAMES
from runtime import ranks
from runtime.command import run_command, run_stage
from runtime.config import MICRO, UserError, fixed_settings, plan
from runtime.flags import parse
from runtime.optimizers import cosine, optimizers
from runtime.ranks import STREAMS, generator
from runtime.run import Run
from runtime.weights import read_spec, weights_digest


def train_base(cfg, device):
    """Flow matching on synthetic scenes with ground truth; writes OUT/base."""
    policy = DiT(DiTConfig.of(cfg), seed=cfg.seed).to(device)
    average = frozen_copy(policy)
    if cfg.compile:
        compile_velocity(policy)
    opts = optimizers([policy], cfg.base_lr, 2 * cfg.base_lr * cfg.muon, weight_decay=0.01)
    ranks.divide_batch(cfg.base_batch, "base-batch")
    run = Run(Path(cfg.out) / "base", fixed_settings(cfg, "base"), cfg.seed, cfg.base_steps,
              dict(policy=policy, average=average), opts, cfg.save_every)
    if run.has_steps:
        scenes = ScenePool("synthetic", "train", cfg.base_scenes, cfg.size, device=device)
    for step, draw in run.steps("base", cfg.stop_at, STREAMS["base"], cfg.base_batch):
        maps, run.where = scenes.draw(draw, device)
        with ranks.autocast(cfg.precision, device):
            loss = flow_loss(policy, maps, NAMES, draw)
        norm = run.update(loss, [list(policy.parameters())], cosine(step, cfg.base_steps, warmup=100))
        update_average(average, policy, average_decay(cfg.base_ema, step))
        run.log(step, {"loss": loss.detach(), "grad/norm": norm}, show=("loss",))
    if run.begin_result("predictor.json"):
        average.save(run.folder, base="none", trained_on="synthetic scenes")


def train_judge(cfg, device):
    """Train the judge on broad scenes with ground truth; writes OUT/judge (a native transformers folder)."""
    if cfg.scenes:
        return tune_judge(cfg, device)
    sizes = MiniSizes(cfg.size, cfg.judge_patch, cfg.judge_width, cfg.judge_vision_layers, cfg.judge_text_layers,
                      cfg.judge_heads)
    model = build_mini_judge(sizes, generator(cfg.seed, STREAMS["judge"])).to(device)
    probe = Probe(sizes, generator(cfg.seed, STREAMS["judge"], 1)).to(device)
    vision = [*model.model.model.vision_tower.parameters(), *probe.parameters()]
    text = [p for name, p in model.model.named_parameters() if ".vision_tower." not in name]
    opts = optimizers([model, probe], cfg.judge_lr, 4 * cfg.judge_lr * cfg.muon, weight_decay=0.02)
    ranks.divide_batch(cfg.judge_batch, "judge-batch")
    warm = int(cfg.judge_warm * cfg.judge_steps)
    run = Run(Path(cfg.out) / "judge", fixed_settings(cfg, "judge"), cfg.seed, cfg.judge_steps,
              dict(judge=model, probe=probe), opts, cfg.save_every)
    if run.has_steps:
        scenes = ScenePool("broad", "train", cfg.judge_scenes, cfg.size, device=device)
    for step, draw in run.steps("judge", cfg.stop_at, STREAMS["judge"], cfg.judge_batch):
        maps, run.where = scenes.draw(draw, device)
        with ranks.autocast(cfg.precision, device):
            loss, stats = judge_loss(model, probe, maps, answers=step >= warm, draw=draw)
        norm = run.update(loss, [vision, text], cosine(step, cfg.judge_steps, warmup=100))
        run.log(step, stats | {"grad/norm": norm}, show=("loss/pairs", "loss/answers"))
    if run.begin_result("judge.json"):
        model.save(run.folder)


def tune_judge(cfg, device):
    """LoRA on --judge from the true answers of --scenes; writes OUT/judge/adapter (PEFT) and OUT/judge (merged).

    Next-token cross-entropy on the whole answer sentence, mean over the answer tokens of the batch. A micro-batch draws
    its dropout from its own place in the run, so any number of processes takes the same steps.
    """
    folder = Path(cfg.out) / "judge"
    weights = weights_digest(cfg.judge)                                         # of files: a server cannot be tuned
    model = load_judge(cfg.judge, device, size=cfg.size)
    add_lora(model, generator(cfg.seed, STREAMS["lora"]), checkpointing=True)
    rows = questions.training_questions(cfg, model.grid)
    ranks.divide_batch(cfg.judge_batch // (cfg.micro or MICRO), "judge-batch / --micro")
    steps = math.ceil(cfg.judge_passes * len(rows) / cfg.judge_batch)
    learnt = trained_part(model.model)
    opts = optimizers([learnt], cfg.judge_lr, 0, weight_decay=0.01, betas=(0.9, 0.999))
    fixed = fixed_settings(cfg, "tuned judge") | dict(questions=len(rows), judge_weights=weights)
    run = Run(folder, fixed, cfg.seed, steps, dict(adapters=learnt), opts, cfg.save_every)
    ranks.say(f"judge: {len(rows)} questions, {steps} steps of {cfg.judge_batch}; "
              f"{sum(p.numel() for p in learnt.parameters())} weights train")
    model.train()
    batches = tuning_batches(rows, range(run.start, steps), model.size, cfg)
    for step, _ in run.steps("judge", cfg.stop_at):
        loss = tuning_gradient(model, *next(batches), step, cfg, device, run)
        norm = run.update(None, [list(learnt.parameters())],
                          cosine(step, steps, warmup=max(1, int(WARMUP * steps))))
        run.log(step, {"loss": loss, "grad/norm": norm}, show=("loss",))
    if run.begin_result("judge.json"):
        lora.save_adapter(model.model, folder / "adapter", base=cfg.judge, task="CAUSAL_LM")
        model.eval().save_about(folder / "adapter")
        lora.merge(model.model)
        model.save(folder)
        print(f"judge: written to {folder}; python eval.py --dataset judge --scenes {cfg.scenes} --judge {folder}",
              flush=True)


def named_judge(cfg, device="cpu"):
    """The judge of a run, opened at its first question (judge.AnyJudge); None: the oracle."""
    return None if cfg.judge == ORACLE else open_judge(cfg.judge or Path(cfg.out) / "judge", device)


def settle(cfg, policy, judge):
    """The settings with what they leave to the networks: --size 0 and --jitter 0.

    returns  runtime.config.Config: size px, jitter in px of it (until here in px of the judge's photos)
    """
    size = cfg.size or max(1, policy.size // policy.multiple) * policy.multiple
    seen, cell = (size, 1) if judge is None else (judge.size, judge.grid)
    return replace(cfg, size=size, jitter=max(1, round((cfg.jitter or cell) * size / seen)))


def train_grpo(cfg, device, sample=grpo.sample_groups, gradient=grpo.policy_gradient):
    """GRPO against the frozen judge, without ground truth; writes OUT/grpo, or OUT/photos for --images.

    Algorithm 1 of ReasonX. Preset mini differs from the paper in five ways (--estimator paper undoes the first two):
    credit    one advantage per pixel, from a proper score (Brier); paper: one per sample, from hard agreement
    rollout   one noisy step, noise in squares, all modalities at once; paper: all steps but the last, one modality
    anchors   0.2 times the supervised loss on synthetic scenes, an early end when a figure drifts; paper: neither
    result    the exponential average of the policy; the paper does not say
    settings  clip, beta, updates per rollout and the dead zone are ours; the paper leaves them open
    returns   data.bank.Judgements of the photos held out, None of procedural ones
    """
    nets = Networks(functools.partial(load_predictor, cfg.start), cfg, device)
    judge = named_judge(cfg, device)
    cfg = settle(cfg, nets.policy, judge)
    album = read_album(cfg, judge)
    opts = optimizers([nets.policy], cfg.lr, 0, weight_decay=0.0, betas=(0.9, 0.95))
    run = Run(cfg.grpo_folder, resume_key(cfg, judge, album), cfg.seed, cfg.steps, nets.modules, opts, cfg.save_every)
    photos, held = judgements(cfg, judge, device, nets.policy.modalities, album, run.has_steps)
    del judge, album                                                            # their memory is free from here on
    watch = Watch(nets, run, cfg, held, base=str(cfg.start), trained_on=cfg.images or "procedural wild photos")
    replay = scene_pool("synthetic", "train", cfg.base_scenes, cfg.size, device=device) if (
        run.has_steps and cfg.replay) else None
    for step, draw in run.steps("grpo", cfg.stop_at, STREAMS["grpo"], cfg.batch):
        batch = grpo.draw_batch(photos, nets.policy.modalities, cfg, draw, device)    # (B, 3, H, W), (B, P, 2, 2)
        run.where = batch.photos
        # 1 sample a group of G maps per photo and modality with the noisy sampler
        maps, transitions = sample(nets.actor, batch)                           # maps[m] (B, G, C, H, W)
        # 2 g_m answers the judge's question from each map; the reward is where the two agree
        scored = {m: grpo.score(maps, batch, m) for m in maps}                  # agree (B, G, P), reward (B, G)
        run.check(map=maps, reward={m: one.reward for m, one in scored.items()})    # that all numbers are finite
        # 3 advantage relative to the group: one number per sample (paper), or one per pixel
        advantage = grpo.advantage(scored, batch, transitions)                  # (M*B, G) or (M*B, G, h, w)
        # 4 clipped objective plus beta times KL to the reference
        stats = reward_statistics(scored)
        for update in range(cfg.updates):
            stats |= gradient(nets, batch, transitions, advantage, run, update)     # ratio is 1 at update 0
            if replay:
                scenes, _ = replay.draw(draw, device)
                run.backward(cfg.replay * supervised_loss(nets.policy, scenes, batch))
            stats["grad/norm"] = run.update(None, [nets.params], cosine(step, cfg.steps, warmup=10))
        nets.follow(step)                                                       # average <- EMA of policy
        run.log(step, stats | {"time/step": run.seconds}, show=("reward", "policy/kl"), **watch.evaluate(step))
    watch.close()
    return held


def supervised_loss(policy, maps, batch):
    """Supervised loss on the true maps of as many scenes as the batch has photos, in its modalities (--replay)."""
    with batch.autocast():
        return policy.loss(maps, batch.modalities, batch.draw)


def resume_key(cfg, judge, album):
    """What a GRPO run may not change when it resumes: settings, sizes, digests of both weights, the held-out photos."""
    ranks.divide_batch(cfg.batch, "batch")
    asked = dict(judge=ORACLE) if judge is None else dict(judge=judge.digest(), judge_size=judge.size)
    return fixed_settings(cfg, "grpo") | asked | dict(policy_weights=weights_digest(cfg.start),
                                                      held_out=held_out_digest(album))


STAGES = dict(base=train_base, judge=train_judge, grpo=train_grpo)


def main(argv=None):
    """Command line: one stage or all, then the tables."""
    preset, cfg, dry_run = parse(argv)
    if dry_run:
        return print(plan(preset, cfg))
    device = ranks.setup(cfg)
    kernels.use(cfg.kernels)
    ranks.say(f"preset {preset}, seed {cfg.seed}, {device}, {torch.get_num_threads()} threads, {kernels.describe()}; "
              f"run folder {cfg.out}")
    check_inputs(cfg)
    for name in needed_stages(cfg):
        held = run_stage(STAGES[name], cfg, device)
        ranks.barrier()
        if cfg.stop_at and name != cfg.stage:                                   # of several stages
            ranks.say(f"train.py: stopped after {cfg.stop_at} steps of {name} (--stop-at); without it the same goes on")
            return
    if ranks.rank() == 0 and cfg.stage in ("all", "grpo") and not cfg.stop_at:
        result = read_spec(cfg.start).at(cfg.grpo_folder)
        if cfg.images:
            report.report_photos(cfg, device, held, cfg.start, result)
        else:
            report.report_wild(cfg, device, cfg.start, result)


def needed_stages(cfg):
    """Stages to run, in order: GRPO first trains the base predictor and the judge that are neither named nor in OUT."""
    if cfg.stage == "all":
        return tuple(name for name, given in (("base", cfg.policy), ("judge", cfg.judge), ("grpo", "")) if not given)
    if cfg.stage != "grpo":
        return (cfg.stage,)
    out = Path(cfg.out)
    missing = [name for name, given, sign in
               (("base", cfg.policy, "predictor.json"), ("judge", cfg.judge, "judge.json"))
               if not given and not (out / name / sign).is_file()]
    if missing:
        ranks.say(f"grpo needs {' and '.join(f'{out}/{name}' for name in missing)}, not there yet: training first")
    return (*missing, "grpo")


def check_inputs(cfg):
    """Open all that the user named: a wrong path fails now, not after hours. raises UserError, OSError, ValueError."""
    if cfg.stage in ("all", "grpo"):
        if cfg.images:
            check_count(cfg.images, cfg.out)
            read_first_rgb(cfg.images, cfg.out)
        if cfg.policy:
            policy = load_predictor(cfg.policy)
            if cfg.replay and not policy.replays:
                raise UserError(f"train.py: --replay {cfg.replay} needs ground truth for every map that {cfg.policy} "
                                "predicts, which the procedural scenes have not; use --replay 0")
        if cfg.judge not in ("", ORACLE):
            open_judge(cfg.judge).digest()
    if cfg.scenes and not cfg.scenes.endswith(".jsonl"):
        list_scenes(cfg.scenes)


if __name__ == "__main__":
    run_command(main, "train.py", resumes=True)
