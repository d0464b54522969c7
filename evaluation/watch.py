"""Validation during a GRPO run: figures for the log, the best copy so far, and an early end when a figure drifts.

The averaged policy is evaluated on what no stage trains on: with --images on the photos held out, by their agreement
with the judge (photos/..., evaluation/agreement.py), which then decides which copy is best; on validation scenes with
true maps (wild/..., synthetic/...) without --images, and for a network that was trained on such scenes. When a figure
has left its band, the average is reset to its state at the evaluation before, and the run ends.
"""
import math

import numpy as np
import torch

from data.pools import scene_pool
from evaluation import metrics
from evaluation.agreement import photo_figures
from evaluation.drift import drift, is_agreement, validation_rows
from evaluation.page import update_page
from evaluation.scores import PAIRS, eval_pairs, predict_maps, score_maps
from grpo import is_unanimous
from runtime.files import read_json, write_json
from runtime.ranks import autocast, combine_numbers, local_part, rank
from runtime.run import about


def reward_statistics(scored):
    """Figures of a step's rewards for the log: dict modality -> grpo.Score to dict name -> 0-dim tensor."""
    stats = {}
    for m, one in scored.items():
        stats |= {f"reward/{m}": one.reward.mean(), f"reward/{m}_spread": one.reward.std(1, correction=0).mean(),
                  f"reward/{m}_unanimous": is_unanimous(one.reward).float().mean()}
    if scored:
        stats["reward"] = sum(stats[f"reward/{m}"] for m in scored) / len(scored)
    return stats


def validation_images(cfg):
    """Number of validation scenes per domain of the figures in a run's log."""
    return min(24, cfg.eval_images)


class Watch:
    """Evaluates the average of a GRPO run, saves the best, and ends the run when a figure has left its band.

    nets   models.copies.Networks;  run  runtime.run.Run, whose `ended` it sets
    origin facts that saved copies record, such as the base
    cfg    eval_every, eval_steps, eval_images, band, forget, size, micro, fsdp, reward of runtime.config.Config
    held   data.bank.Judgements of the photos held out, None: there are none
    """

    def __init__(self, nets, run, cfg, held=None, **origin):
        self.nets = nets
        self.run = run
        self.cfg = cfg
        self.held = held
        self.origin = origin | {k: v for k, v in about().items() if k in ("command", "commit")}
        seen = [row for row in validation_rows(run.folder) if row["step"] < run.start]
        self.drifted = drift(seen[-1], seen[0], cfg.band, cfg.forget) if seen else ""    # the same on every rank
        # of the evaluation before, in the host's memory: it is read when a figure has drifted, else only written
        self.kept = [local_part(p).detach().to("cpu", copy=True) for p in self.average_params]
        run.ended = bool(self.drifted)

    @property
    def average_params(self):
        """The averaged parameters."""
        return list(self.nets.modules["average"].parameters())

    def evaluate(self, step):
        """Validation figures after a step, for the log; {} between evaluations and on ranks that do not evaluate."""
        cfg = self.cfg
        if not cfg.eval_every or step and (step + 1) % cfg.eval_every:
            return {}
        figures = self._figures(step)
        if rank() == 0:
            figures |= dict(band=cfg.band, forget=cfg.forget)                   # that the page draws
            update_page(self.run.folder if cfg.images else self.run.folder.parent, dict(step=step, **figures))
        self.run.ended = bool(combine_numbers(dict(drifted_max=float(bool(self.drifted))))["drifted_max"])
        with torch.no_grad():
            for p, kept in zip(self.average_params, self.kept, strict=True):
                if self.run.ended:
                    local_part(p).copy_(kept)
                else:
                    kept.copy_(local_part(p))
        return figures

    def _figures(self, step):
        """Figures of the average. Sets `drifted`, the figure that has left its band, and saves the best so far.

        All ranks compute maps. On a GPU in bf16, as in training; on a CPU in fp32
        """
        cfg = self.cfg
        average = self.nets.average
        device = self.average_params[0].device
        figures = {}
        with autocast("fp32" if device.type == "cpu" else cfg.precision, device):
            if self.held is None or average.replays:
                figures = diagnose(average, cfg.size, cfg.eval_steps, validation_images(cfg), batch=cfg.micro or 64,
                                   together=True)
            if self.held is not None:
                figures |= {f"photos/{k}": float(np.nanmean(x))
                            for k, x in photo_figures(average, self.held, cfg, cfg.eval_images).items()}
        if not self.nets.takes_part:
            return {}
        figures = combine_numbers(figures) if cfg.fsdp else figures             # so that all ranks decide alike
        start = (validation_rows(self.run.folder) or [figures])[0]
        self.drifted = drift(figures, start, cfg.band, cfg.forget)
        if not self.drifted and is_best(self.run.folder, figures):
            self.nets.save_average(self.run.folder / "best", **self.origin, step=step + 1)
            if rank() == 0:
                write_json(self.run.folder / "best.json", dict(step=step + 1, score=mean_accuracy(figures), **figures))
        return figures

    def close(self):
        """Print why the run ended early, if it did; write the average when the run is complete."""
        if self.drifted and rank() == 0:
            print(f"grpo: stopped after step {self.run.done}: {self.drifted}; the result is the average at the "
                  "evaluation before; more --kl-weight or --replay, or a smaller --lr, keeps the next from drifting; "
                  "with --band 0 --forget 0 this one goes on", flush=True)
        if self.run.is_complete and self.nets.takes_part:
            self.nets.save_average(self.run.folder, **self.origin)


def is_best(folder, figures):
    """Whether validation figures are the best of a run so far (best.json), by mean_accuracy."""
    best = folder / "best.json"
    score = mean_accuracy(figures)
    return math.isfinite(score) and not (best.exists() and read_json(best)["score"] >= score)


def mean_accuracy(figures):
    """Mean of rewards and hard agreements on held-out photos, without them of all pair accuracies; nan without any."""
    values = [v for k, v in figures.items() if is_agreement(k)]
    values = values or [v for k, v in figures.items() if k.endswith("/pairs")]
    return sum(values) / len(values) if values else math.nan


def diagnose(policy, size, steps, n=24, seed=0, batch=64, together=False):
    """Figures on n validation scenes per domain, for the log: scores, and sharpness and spread of wild maps.

    No stage trains on these scenes. When the reward rises while sharpness or spread moves away from the start, the
    policy exploits the reward. When synthetic errors grow, it forgets.
    """
    out = {}
    for domain in ("wild", "synthetic"):
        maps = scene_pool(domain, "val", n, size).all()
        pred = predict_maps(policy, maps["rgb"], steps, seed, batch, together)
        values = score_maps(pred, maps, eval_pairs(maps, PAIRS, 1, seed), warn=False)
        out |= {f"{domain}/{k}": float(np.nanmean(v)) for k, v in values.items()}
        if domain == "wild":
            for m in policy.modalities:
                energy = [metrics.high_frequency_energy(x.numpy()) for x in pred[m]]
                out |= {f"wild/{m}_high_frequency": float(np.mean(energy)),
                        f"wild/{m}_spread": float(pred[m].std((2, 3)).mean())}
    return out
