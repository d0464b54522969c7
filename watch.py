"""What is watched while GRPO trains: figures on validation scenes, and whether one has left its band."""
import numpy as np

import data
import metrics
from scores import METRICS, PAIRS, eval_pairs, predict_maps, score_maps


def diagnose(policy, size, steps, n=24, seed=0, batch=64):
    """Figures on n validation scenes a domain, for the log: scores, and the sharpness and spread of wild maps.

    No stage learns from them. A reward that rises while high-frequency energy or spread leaves the true maps' band is
    being hacked; synthetic scores that fall are forgetting.
    """
    out = {}
    for domain in ("wild", "synthetic"):
        maps = data.scene_pool(domain, "val", n, size).all()
        pred = predict_maps(policy, maps["rgb"], steps, seed, batch)
        values = score_maps(pred, maps, eval_pairs(maps, PAIRS, 1, seed), warn=False)
        out |= {f"{domain}/{k}": float(np.nanmean(v)) for k, v in values.items()}
        if domain == "wild":
            for m in policy.modalities:
                energy = [metrics.high_frequency_energy(x.numpy()) for x in pred[m]]
                out |= {f"wild/{m}_high_frequency": float(np.mean(energy)),
                        f"wild/{m}_spread": float(pred[m].std((2, 3)).mean())}
    return out


def drift(now, start, band, forget):
    """What has left its band since the start, as words; "" while nothing has.

    now, start  figures of `diagnose`
    band        factor by which sharpness and spread of wild maps may change, either way; 0: any
    forget      share by which a synthetic validation error may grow; 0: any
    """
    for name in now:
        if start.get(name) is None or now[name] is None:                        # not finite, or not measured then
            continue
        if band and name.startswith("wild/") and name.endswith(("_high_frequency", "_spread")):
            factor = now[name] / max(start.get(name) or 0, 1e-12)
            if not 1 / band <= factor <= band:
                return f"{name} is {factor:.2g} x what it was (--band {band:g})"
        domain, _, metric = name.partition("/")
        if forget and domain == "synthetic" and METRICS[metric][1] < 0 and now[name] > (1 + forget) * start[name]:
            return f"{name} has grown from {start[name]:.4g} to {now[name]:.4g} (--forget {forget:g})"
    return ""
