"""Train: `--stage base` (flow matching), `--stage judge`, `--stage grpo`, or all three and a before/after table.

    python train.py                                      preset mini: 2 CPU cores, no downloads
    python train.py --stage grpo --images DIR            GRPO on your own photos
    python train.py --stage judge --scenes DIR --judge MODEL    LoRA on a published judge, from ground truth
    torchrun --nproc_per_node=8 train.py --stage grpo    a share of the photos on each process

Each stage is one loop; the same command again resumes. A group stays on one rank.
"""
import copy
import json
import math
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

import baselines
import eval as evaluation
import files
import grpo
import kernels
import lora
import metrics
import questions
import rewards
import runtime
from bank import Bank
from config import Config, parse
from grpo_step import Rows, explore, mean, surrogate
from judge import Closed, add_lora, load_judge
from mini_judge import MiniJudge, Probe, build_mini, judge_loss
from photos import Photos, read_first_rgb
from pictures import panel, picture_of, save_png
from pools import ScenePool, list_scenes, scene_pool
from predictor import NAMES, DiT, DiTConfig, compile_velocity, flow_loss, load_predictor
from relations import MODALITIES
from runtime import Run, UserError, cosine, ema_update, optimizers

FIELDS = [f.name for f in fields(Config)]
GRPO_SETTINGS = {"size", "images", "policy", "judge", *FIELDS[FIELDS.index("method"):FIELDS.index("ema") + 1]} - {
    "checkpointing", "micro"}                                                   # every flag but what changes no result
DIT_SETTINGS = ("size", "width", "encoder_layers", "layers", "heads", "patch")
GAP = 0.1                         # most that two computations of a velocity in bf16 differ, relative (eager, CPU: 0)
SEEDS = dict(base=1, judge=2, grpo=3, photos=4, lora=5, oracle=6)      # streams of random numbers, one per purpose


def settings(cfg, *names, prefix=None):
    """The settings that a run may not change when it resumes."""
    return {k: v for k, v in asdict(cfg).items() if k in names or (prefix and k.startswith(prefix))}


def shares(total, name):
    """This rank's share of a batch. raises UserError when it does not divide."""
    if total % runtime.world():
        raise UserError(f"train.py: --{name} {total} is not divisible by {runtime.world()} processes; "
                        f"use a multiple of {runtime.world()}")
    return total // runtime.world()


def drawn(pool, batch, rng, device):
    """This rank's share of a batch drawn from a ScenePool, and the scenes' numbers."""
    index = runtime.share(torch.randint(len(pool), (batch,), generator=rng))
    return pool.pick(index, device), [f"scene {i}" for i in index.tolist()]


def base(cfg, device):
    """Flow matching on synthetic scenes with ground truth; writes OUT/base."""
    policy = DiT(DiTConfig(cfg.size, cfg.patch, cfg.width, cfg.encoder_layers, cfg.layers, cfg.heads),
                 seed=cfg.seed).to(device)
    average = copy.deepcopy(policy).requires_grad_(False)
    if cfg.compile:
        compile_velocity(policy)
    params = list(policy.parameters())
    opts = optimizers([policy], cfg.base_lr, cfg.base_muon, weight_decay=0.01)
    shares(cfg.base_batch, "base-batch")
    run = Run(Path(cfg.out) / "base", settings(cfg, *DIT_SETTINGS, prefix="base_"), cfg.seed, cfg.base_steps,
              dict(policy=policy, average=average), opts, cfg.save_every, cfg.keep)
    if run.start < run.steps:
        scenes = ScenePool("synthetic", "train", cfg.base_scenes, cfg.size, device=device)
    for step in run.loop("base", cfg.stop_at):
        rng = run.rng(step, SEEDS["base"])
        maps, run.where = drawn(scenes, cfg.base_batch, rng, device)
        with runtime.autocast(cfg.precision, device):
            loss = flow_loss(policy, maps, tuple(MODALITIES), rng)
        norm = run.update(loss, [params], cosine(step, cfg.base_steps, warmup=100))
        ema_update(average, policy, min(cfg.base_ema, (step + 1) / (step + 10)))
        run.log(step, show=("loss",), **runtime.shared({"loss": loss.detach(), "grad/norm": norm}))
    if run.finished("predictor.json"):
        average.save(run.folder, base="none", trained_on="synthetic scenes")


def judge(cfg, device):
    """Train the judge on broad scenes with ground truth; writes OUT/judge (a native transformers folder)."""
    if cfg.scenes:
        return tune_judge(cfg, device)
    sizes = MiniJudge(cfg.size, cfg.judge_patch, cfg.judge_width, cfg.judge_vision_layers, cfg.judge_text_layers,
                      cfg.judge_heads)
    model = build_mini(sizes, runtime.generator(cfg.seed, SEEDS["judge"])).to(device)
    probe = Probe(sizes, runtime.generator(cfg.seed, SEEDS["judge"], 1)).to(device)
    vision = [*model.model.model.vision_tower.parameters(), *probe.parameters()]
    text = [p for name, p in model.model.named_parameters() if ".vision_tower." not in name]
    opts = optimizers([model, probe], cfg.judge_lr, cfg.judge_muon, cfg.judge_decay)
    shares(cfg.judge_batch, "judge-batch")
    warm = int(cfg.judge_warm * cfg.judge_steps)
    run = Run(Path(cfg.out) / "judge", settings(cfg, "size", prefix="judge_"), cfg.seed, cfg.judge_steps,
              dict(judge=model, probe=probe), opts, cfg.save_every, cfg.keep)
    if run.start < run.steps:
        scenes = ScenePool("broad", "train", cfg.judge_scenes, cfg.size, device=device)
    for step in run.loop("judge", cfg.stop_at):
        rng = run.rng(step, SEEDS["judge"])
        maps, run.where = drawn(scenes, cfg.judge_batch, rng, device)
        with runtime.autocast(cfg.precision, device):
            loss, stats = judge_loss(model, probe, maps, answers=step >= warm, rng=rng)
        norm = run.update(loss, [vision, text], cosine(step, cfg.judge_steps, warmup=100))
        run.log(step, show=("loss/pairs", "loss/answers"), **runtime.shared(stats), **{"grad/norm": norm})
    if run.finished("judge.json"):
        model.save(run.folder)


def judge_questions(cfg, grid):
    """Training questions of --scenes, drawn once by rank 0 and kept in OUT/judge; as they are in a .jsonl file."""
    if cfg.scenes.endswith(".jsonl"):
        return questions.read_jsonl(cfg.scenes)
    draw = lambda: questions.cached(Path(cfg.out) / "judge" / "questions.json", cfg.scenes, cfg.judge_pairs,  # noqa: E731
                                    cfg.size, cfg.seed, "train", runtime.rank() == 0, grid)
    if runtime.rank() == 0:
        draw()
    runtime.barrier()
    return draw()


def tune_judge(cfg, device):
    """LoRA on --judge from the true answers of --scenes; writes OUT/judge/adapter (PEFT) and OUT/judge (merged).

    Next-token cross-entropy on the whole answer sentence, mean over the answer tokens of the batch. A micro-batch draws
    its dropout from its own place in the run, so any number of processes takes the same steps.
    """
    model = load_judge(cfg.judge, device, size=cfg.size)
    add_lora(model, cfg.judge_rank, cfg.judge_alpha, cfg.judge_dropout, runtime.generator(cfg.seed, SEEDS["lora"]),
             checkpointing=True)
    rows, folder = judge_questions(cfg, model.grid), Path(cfg.out) / "judge"
    if not rows:
        raise UserError(f"train.py: {cfg.scenes} gives no training question; want more scenes (a tenth is held out)")
    parts, steps = shares(cfg.judge_batch // cfg.judge_micro, "judge-batch / --judge-micro"), math.ceil(
        cfg.judge_passes * len(rows) / cfg.judge_batch)
    learnt = runtime.trained(model.model)
    opts = optimizers([learnt], cfg.judge_lr, 0, cfg.judge_decay, betas=(0.9, 0.999))
    frozen = dict(questions=len(rows), judge_weights=files.weights_digest(cfg.judge))
    run = Run(folder, settings(cfg, "size", "scenes", "judge", prefix="judge_") | frozen, cfg.seed, steps,
              dict(adapters=learnt), opts, cfg.save_every, cfg.keep)
    if runtime.rank() == 0:
        print(f"judge: {len(rows)} questions, {steps} steps of {cfg.judge_batch}; "
              f"{sum(p.numel() for p in learnt.parameters())} weights train", flush=True)
    model.train()
    for step in run.loop("judge", cfg.stop_at):
        batch = questions.batch_of(rows, step, cfg.judge_batch, cfg.seed)
        tokens, loss = sum(len(model.sentences[r["modality"]][not r["first"]]) for r in batch), []
        own = range(runtime.rank(), parts * runtime.world(), runtime.world())
        run.where = [r["id"] for k in own for r in batch[k * cfg.judge_micro:(k + 1) * cfg.judge_micro]]
        for k in own:
            part = batch[k * cfg.judge_micro:(k + 1) * cfg.judge_micro]
            images = questions.marked(part, cfg.scenes, model.size).to(device)
            with torch.random.fork_rng():
                torch.manual_seed(int(torch.randint(2**62, (1,), generator=runtime.generator(cfg.seed, step, k))))
                with runtime.autocast(cfg.precision, device):
                    total, n = model.sentence_loss(images, [r["modality"] for r in part], [r["first"] for r in part])
                run.backward(total * (runtime.world() / tokens))                # `update` averages over the ranks
            loss.append(total.detach() / n)
        norm = run.update(None, [list(learnt.parameters())],
                          cosine(step, steps, warmup=max(1, int(cfg.judge_warmup * steps))))
        run.log(step, show=("loss",), **runtime.shared({"loss": mean(loss), "grad/norm": norm}))
    if run.finished("judge.json"):
        lora.save_adapter(model.model, folder / "adapter", base=cfg.judge, task="CAUSAL_LM")
        model.eval().save_about(folder / "adapter")
        lora.merge(model.model)
        model.save(folder)
        print(f"judge: written to {folder}; python eval.py --dataset judge --scenes {cfg.scenes} --judge {folder}",
              flush=True)


def judge_digest(cfg):
    """Digest of the judge's weights, which a run may not exchange half way."""
    return cfg.judge if cfg.judge == questions.ORACLE else files.weights_digest(cfg.judge or Path(cfg.out) / "judge")


def judged_photos(cfg, device, shared=True):
    """Unlabeled training photos and what the judge says of them.

    shared   True when all ranks call: each asks about its share;  False: this one asks what is left
    returns  photos (n, 3, S, S) uint8, pts (n, P, 2, 2), prob (n, P, M) from the judgement bank, names (n)
    """
    if cfg.judge == questions.ORACLE:
        scenes = scene_pool("wild", "train", cfg.photos, cfg.size, device=device).all()
        pts, prob = questions.oracle_answers(scenes, cfg.bank_pairs, runtime.generator(cfg.seed, SEEDS["oracle"]))
        return (scenes["rgb"] * 255).round().byte(), pts, prob, [f"wild {i}" for i in range(len(pts))]
    if cfg.images:
        found = Photos(cfg.images, cfg.size, cfg.photos)
        photos, names = found.images, found.names
        what = f"{len(photos)} photos of {cfg.images} ({len(found.skipped)} unreadable)"
    else:
        pool = ScenePool("wild", "train", cfg.photos, cfg.size, keys=("rgb",), device=device)
        photos = (pool.all()["rgb"] * 255).round().byte()
        names, what = [f"wild {i}" for i in range(len(photos))], f"{len(photos)} procedural wild photos"
    count = dict(photos_min=len(photos), photos_max=len(photos))
    if shared and len(set(runtime.shared(count).values())) > 1:
        raise UserError(f"train.py: processes can read different numbers of the photos in {cfg.images}; "
                        "want a folder that all of them see alike")
    judge_model = Closed(cfg.judge or Path(cfg.out) / "judge", device)          # in memory only if the bank asks it
    if judge_model.size != cfg.size:
        raise UserError(f"train.py: the judge sees {judge_model.size} px photos and --size is {cfg.size}; "
                        "use one size for both")
    bank = Bank(cfg.bank or Path(cfg.out) / "bank", judge_model)
    if shared and runtime.world() > 1:                                          # each rank asks about its share
        bank.fill(photos[runtime.rank()::runtime.world()], cfg.bank_pairs, device)
        runtime.barrier()
    pts, prob = bank.fill(photos, cfg.bank_pairs, device)
    if runtime.rank() == 0:
        print(f"grpo: {what}; judgement bank: {bank.asked} pairs asked, {bank.known} already known", flush=True)
    return photos, pts, prob, names


def start_policy(cfg, start, device):
    """The predictor that GRPO starts from."""
    return fitted(load_predictor(start).to(device), cfg)


def fitted(policy, cfg):
    """A predictor with fresh adapters and recomputed activations, if asked for."""
    if cfg.lora:
        lora.inject(policy.network, policy.lora_targets, cfg.lora, cfg.lora,
                    rng=runtime.generator(cfg.seed, SEEDS["lora"]))
    policy.checkpointing(bool(cfg.checkpointing))
    return policy


def companions(policy, cfg, device):
    """Copies of the policy: the frozen start, its average, and the one that draws the rollouts (itself, or compiled).

    The first and the last keep in 16 bits what is multiplied in 16 bits, unless adapters share it with the policy.
    """
    ref, average = (runtime.frozen_copy(policy) for _ in range(2))
    lora.disable(ref)
    actor = runtime.frozen_copy(policy) if cfg.compile else policy
    if not cfg.lora and not cfg.fsdp and runtime.in_bf16(cfg.precision, device):
        for net in {ref, actor} - {policy}:
            runtime.halve(net.network)
    for net in (policy, ref, actor) if cfg.compile else ():
        compile_velocity(net)
    for net in (policy, ref, average) if cfg.fsdp else ():
        runtime.shard(net.network, device, ("encode", "velocity") if net.network is net else ())
        net.to(device)
    return ref, average, actor


def keep(policy, cfg, start, folder, **about):
    """Write a policy (rank 0). Where its weights are spread over the ranks, all call."""
    state = {k: runtime.whole(v) for k, v in policy.network.state_dict().items()} if cfg.fsdp else {}
    if runtime.rank() == 0:
        if cfg.fsdp:
            policy = start_policy(cfg, start, "cpu")
            policy.network.load_state_dict(state)
        made = {k: v for k, v in runtime.about().items() if k in ("command", "commit")}
        policy.save(folder, base=str(start), trained_on=cfg.images or "procedural wild photos", **made, **about)


def evaluated(run):
    """Rows of a run's log that hold diagnostics."""
    return [r for r in files.read_log(run.folder / "metrics.jsonl") if any(k.startswith("synthetic/") for k in r)]


def watch(average, run, cfg, start, step):
    """Diagnose the averaged policy on validation scenes and keep the best.

    returns  its figures, and what has left its band since the first step (words, "" while nothing has)
    """
    figures = evaluation.diagnose(average, cfg.size, cfg.eval_steps, cfg.val_images, batch=cfg.micro or 64)
    figures = runtime.shared(figures) if cfg.fsdp else figures                  # or ranks might judge it differently
    drifted = evaluation.drift(figures, (evaluated(run) or [figures])[0], cfg.band, cfg.forget)
    if not drifted and run.improves(figures):
        keep(average, cfg, start, run.folder / "best", step=step + 1)
        run.improved(step + 1, figures)
    return figures, drifted


def tune(cfg, device):
    """GRPO against the frozen judge, without ground truth; writes OUT/grpo, or OUT/photos for --images."""
    start = cfg.policy or Path(cfg.out) / "base"
    policy = start_policy(cfg, start, "cpu" if cfg.fsdp else device)
    ref, average, actor = companions(policy, cfg, device)
    learnt, averaged = runtime.trained(policy), runtime.trained(average, like=policy)
    acting, params = runtime.trained(actor, like=policy), list(learnt.parameters())
    opts = optimizers([policy], cfg.lr, 0, weight_decay=0.0, betas=(0.9, 0.95))
    shares(cfg.batch, "batch")
    frozen = dict(policy_weights=files.weights_digest(start), judge_weights=judge_digest(cfg))
    run = Run(grpo_folder(cfg), settings(cfg, *GRPO_SETTINGS) | frozen, cfg.seed, cfg.steps,
              dict(policy=learnt, average=averaged), opts, cfg.save_every, cfg.keep)
    takes_part = runtime.rank() == 0 or bool(cfg.fsdp)                          # in evaluating and writing the average
    sde = grpo.STEPS[policy.exploration if cfg.exploration == "auto" else cfg.exploration]
    seen = [row for row in evaluated(run) if row["step"] < run.start]           # alike on every rank: it may be a run
    drifted = evaluation.drift(seen[-1], seen[0], cfg.band, cfg.forget) if seen else ""     # that has stopped early
    inside, left = [p.detach().clone() for p in averaged.parameters()], float(bool(drifted))
    if run.start < run.steps and not drifted:
        photos, bank_pts, bank_prob, names = judged_photos(cfg, device)
        replay = scene_pool("synthetic", "train", cfg.base_scenes, cfg.size, device=device) if cfg.replay else None
        truth = scene_pool("wild", "train", cfg.photos, cfg.size, device=device) if (
            cfg.method == "supervised") else None
    for step in () if drifted else run.loop("grpo", cfg.stop_at):
        rng, began = run.rng(step, SEEDS["grpo"]), time.perf_counter()
        rows = Rows(cfg, policy.modalities, photos, bank_pts, bank_prob, cfg.batch, rng, device)
        run.where = [names[i] for i in rows.picked]
        stats = {}
        if cfg.method == "grpo":
            if cfg.compile:
                runtime.follow(acting.parameters(), params)
            taken, advantage, stats = explore(actor, rows, cfg, sde, rng, run.check)
        for update in range(cfg.updates):
            if cfg.method == "grpo":
                loss, parts = surrogate(policy, ref, rows, taken, advantage, cfg, sde, run.backward,
                                        anchor=update == 0)
                gap, most = parts.pop("policy/gap", None), GAP if cfg.compile or device.type == "cuda" else 0
                if update == 0:
                    stats["policy/gap"] = gap
                    if not (gap <= most and parts["policy/ratio_min"] == parts["policy/ratio_max"] == 1):
                        run.fail("the ratio is not 1 before the first update: rollout and update computed velocities "
                                 f"{float(gap):.2g} apart, want {most:g}")
            else:
                loss, parts = baselines.loss(policy, ref, truth, rows, cfg, rng, run.backward)
            if cfg.replay:
                with rows.amp:
                    scenes, _ = drawn(replay, cfg.batch, rng, device)
                    run.backward(cfg.replay * policy.loss(scenes, rows.names, rng))
            norm = run.update(None, [params], cosine(step, cfg.steps, warmup=10))
        ema_update(averaged, learnt, min(cfg.ema, (step + 1) / (step + 10)))
        parts["time/step"] = time.perf_counter() - began
        stats = runtime.shared({**stats, **parts, "grad/norm": norm, "loss": loss})
        if cfg.eval_every and (step == 0 or (step + 1) % cfg.eval_every == 0):
            figures, drifted = watch(average, run, cfg, start, step) if takes_part else ({}, "")
            stats |= figures
            left = runtime.shared(dict(left_max=float(bool(drifted))))["left_max"]
            with torch.no_grad():                                               # remember the average, or go back to it
                for p, kept in zip(averaged.parameters(), inside, strict=True):
                    (p if left else kept).copy_(kept if left else p)
        run.log(step, show=("reward", "policy/kl"), **stats)
        if left:
            run.done = step + 1
            run.save(run.done)
            break
    if drifted and runtime.rank() == 0:
        print(f"grpo: stopped after step {run.done}: {drifted}; the result is the average at the evaluation before; "
              "more --kl-weight or --replay, or a smaller --lr, keeps the next from drifting; with --band 0 --forget 0 "
              "this one goes on", flush=True)
    if (drifted or run.done >= run.steps) and takes_part:
        keep(average, cfg, start, run.folder)


def report_wild(cfg, device):
    """Before/after table on held-out scenes, the judge beside it, a picture; writes OUT/report.json, OUT/panel.png."""
    out = Path(cfg.out)
    before, after = load_predictor(cfg.policy or out / "base").to(device), load_predictor(out / "grpo").to(device)
    oracle = cfg.judge == questions.ORACLE
    judge_model = None if oracle else load_judge(cfg.judge or out / "judge").to(device)
    results = []
    for name in ("wild", "synthetic", "broad"):
        maps = ScenePool(name, "test", cfg.eval_images, cfg.size).all()
        pairs = evaluation.eval_pairs(maps, evaluation.PAIRS, 1, 0)
        pred = [evaluation.predict(p, maps["rgb"], cfg.eval_steps, 0, cfg.micro or 64) for p in (before, after)]
        values = [evaluation.score(p, maps, pairs) for p in pred]
        ask = judge_model is not None and name != "synthetic"
        answers = evaluation.judge_scores(judge_model, maps, pred[0], 0) if ask else None
        results.append(evaluation.report(name, values[1], values[0], answers))
        if name == "wild":
            save_panel(out / "panel.png", maps["rgb"], *pred, truth=maps)
    files.write_json(out / "report.json", dict(about=runtime.about(), seed=cfg.seed, tables=results))
    print(f"\nwritten: {out}/report.json, {out}/panel.png; "
          f"maps of your own photos: python predictor.py PHOTO --checkpoint {out}/grpo")


def report_photos(cfg, device):
    """Before/after figures without ground truth on the photos of --images; writes OUT/photos/report.json, panel.png."""
    out = Path(cfg.out)
    photos, pts, prob, names = (x[:cfg.eval_images] for x in judged_photos(cfg, device, shared=False))
    rgb = photos.float() / 255
    pred, rows = [], {}
    for path in (cfg.policy or out / "base", grpo_folder(cfg)):                 # one in memory at a time
        policy = load_predictor(path).to(device)
        pred.append(evaluation.predict(policy, rgb, cfg.eval_steps, 0, cfg.micro or 64))
        del policy
    for m in pred[0]:
        rows[f"reward/{m}"] = [rewards.judged(p[m][:, None], pts, prob[..., NAMES.index(m)], m, cfg)[2][:, 0].numpy()
                               for p in pred]
    if {"depth", "normal"} <= pred[0].keys():
        rows["depth-normal RMSE"] = [evaluation.photo_scores(p) for p in pred]
    result = {"n": len(rgb),
              "judge/confidence": {m: float((2 * prob[..., k] - 1).abs().mean()) for k, m in enumerate(NAMES)}}
    lines = []
    for name, (a, b) in rows.items():
        change, low, high = metrics.bootstrap_interval(a, b)
        result[name] = dict(base=float(a.mean()), x=float(b.mean()), change=change, low=low, high=high)
        lines.append((name,
                      f"confidence {result['judge/confidence'][name[7:]]:.3f}" if name.startswith("reward") else "ours",
                      f"{a.mean():.4f}", f"{b.mean():.4f}", f"{change:+.4f}", f"[{low:+.4f}, {high:+.4f}]"))
    evaluation.table(f"{cfg.images}: {len(rgb)} of the photos trained on; no ground truth exists; "
                     "paired bootstrap 95 %",
                     lines, ("figure", "judge", "base", "X", "change", "95 %"))
    files.write_json(out / "photos" / "report.json", dict(about=runtime.about(), seed=cfg.seed, **result))
    save_panel(out / "photos" / "panel.png", rgb, *pred, labels=names)


def save_panel(path, rgb, before, after, truth=None, labels=None, rows=4):
    """Picture: a row per photo with each modality before, after and, if known, in truth."""
    tiles = []
    for i in range(min(rows, len(rgb))):
        tiles.append((labels[i] if labels else "photo", rgb[i].numpy()))
        for m in before:
            for word, maps in (("base", before), ("X", after), ("truth", truth)):
                if maps is not None:
                    value = maps[m][i]
                    if word == "truth" and m == "depth":                        # sky as far as the farthest surface
                        value = value.masked_fill(~truth["mask"][i], value[truth["mask"][i]].max())
                    tiles.append((f"{m} {word}", picture_of(m, value.numpy())))
    save_png(path, panel(tiles, columns=len(tiles) // min(rows, len(rgb))))


def main(argv=None):
    """Command line: one stage or all, then the tables."""
    preset, cfg, dry_run = parse(argv)
    if dry_run:
        return print_plan(preset, cfg)
    device = runtime.setup(cfg)
    kernels.use(cfg.kernels)
    if runtime.rank() == 0:
        print(f"preset {preset}, seed {cfg.seed}, {device}, {torch.get_num_threads()} threads, {kernels.describe()}; "
              f"run folder {cfg.out}", flush=True)
    check_inputs(cfg)
    stages = dict(base=base, judge=judge, grpo=tune)
    for name in needed(cfg):
        take(stages[name], cfg, device)
        runtime.barrier()
        if cfg.stop_at and name != cfg.stage:                                       # of several stages
            if runtime.rank() == 0:
                print(f"train.py: stopped after {cfg.stop_at} steps of {name} (--stop-at); without it the same goes on")
            return
    if runtime.rank() == 0 and cfg.stage in ("all", "grpo") and not cfg.stop_at:
        (report_photos if cfg.images else report_wild)(cfg, device)


def take(stage, cfg, device):
    """Run a stage; with --detect-anomaly a step that is not finite is repeated, from the checkpoint before it, under
    torch's anomaly detection, which names the operation. raises runtime.NotFinite, RuntimeError (torch's)."""
    try:
        return stage(cfg, device)
    except runtime.NotFinite as error:
        if not cfg.detect_anomaly:
            raise
        print(f"train.py: {error or 'another process stopped'}; repeating step {error.step} to find the operation",
              file=sys.stderr, flush=True)
        Run.suspect = error.step
    try:                                                                        # here the first run's memory is free
        stage(cfg, device)
    finally:
        Run.suspect = None


def needed(cfg):
    """Stages to run, in order: GRPO first trains the base predictor and the judge that are neither named nor in OUT."""
    if cfg.stage == "all":
        return tuple(name for name, given in (("base", cfg.policy), ("judge", cfg.judge), ("grpo", "")) if not given)
    if cfg.stage != "grpo":
        return (cfg.stage,)
    out = Path(cfg.out)
    missing = [name for name, given, sign in
               (("base", cfg.policy, "predictor.json"), ("judge", cfg.judge, "judge.json"))
               if not given and not (out / name / sign).is_file()]
    if missing and runtime.rank() == 0:
        print(f"grpo needs {' and '.join(f'{out}/{name}' for name in missing)}, not there yet: training first",
              flush=True)
    return (*missing, "grpo")


def grpo_folder(cfg):
    """Where the GRPO stage keeps its run: OUT/grpo, or OUT/photos for the user's own photos."""
    return Path(cfg.out) / ("photos" if cfg.images else "grpo")


def check_inputs(cfg):
    """Open everything the user named, so that a wrong path fails now and not after hours. raises as the readers do."""
    if cfg.stage in ("all", "grpo"):
        if cfg.images:
            read_first_rgb(cfg.images)
        if cfg.policy:
            policy = load_predictor(cfg.policy)
            for flag, maps in (("depth_normal", {"depth", "normal"}), ("shading", {"albedo", "irradiance"})):
                if getattr(cfg, flag) and maps - set(policy.modalities):
                    raise UserError(f"train.py: --{flag.replace('_', '-')} wants {' and '.join(sorted(maps))}; "
                                    f"{cfg.policy} predicts {', '.join(policy.modalities)}")
            if cfg.method == "supervised" and not policy.replays:
                raise UserError(f"train.py: --method supervised needs true maps of all that {cfg.policy} predicts, "
                                "which the procedural scenes have not")
            if cfg.replay and not policy.replays:
                raise UserError(f"train.py: --replay {cfg.replay} needs ground truth for every map that {cfg.policy} "
                                "predicts, which the procedural scenes have not; use --replay 0")
        if cfg.judge not in ("", questions.ORACLE):
            Closed(cfg.judge).digest()
    if cfg.scenes and not cfg.scenes.endswith(".jsonl"):
        list_scenes(cfg.scenes)


def print_plan(preset, cfg):
    """Print the settings and the batch arithmetic (--dry-run)."""
    rows = cfg.batch * (4 if cfg.modalities == "joint" else 1)
    print(json.dumps(dict(preset=preset, **asdict(cfg)), indent=1))
    print(f"base: {cfg.base_steps} steps x {cfg.base_batch} photos x 4 modalities\n"
          + (f"judge: LoRA on {cfg.judge}, {cfg.judge_passes:g} passes over {cfg.judge_pairs} x 4 questions a scene, "
             f"{cfg.judge_batch} a step, {cfg.judge_micro} in memory\n" if cfg.scenes else
             f"judge: {cfg.judge_steps} steps x {cfg.judge_batch} marked photos x 4 questions\n") +
          f"bank: {cfg.photos} photos x {cfg.bank_pairs} pairs x 4 questions, asked once\n"
          f"grpo: {cfg.steps} steps x {rows} rows x {cfg.group} samples = {cfg.steps * rows * cfg.group} samples, "
          f"{cfg.pairs} pairs each; {cfg.steps * cfg.batch / cfg.photos:.1f} epochs")


if __name__ == "__main__":
    runtime.run_command(main, "train.py", resumes=True)
