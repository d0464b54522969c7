"""How far a GRPO run may move: factors of validation figures since the first evaluation, and the bands they keep."""
from evaluation.scores import METRICS
from runtime.files import read_log

AGREEMENTS = ("reward", "agreement")     # figures of held-out photos that lie in [0, 1], 1 is best
LEAST_ERROR = 0.05                # a start that disagrees less with the judge counts as this: a pair more is no drift


def validation_rows(folder):
    """Rows of a run's log that hold validation figures."""
    return [row for row in read_log(folder / "metrics.jsonl")
            if any(k.startswith(("synthetic/", "photos/")) for k in row)]


def is_agreement(name):
    """Whether a validation figure is agreement with the judge."""
    return name.startswith(tuple(f"photos/{kind}/" for kind in AGREEMENTS))


def watched_kind(name):
    """What a validation figure is watched for: "sharpness", "spread", "forgetting"; "" for a figure that is not."""
    domain, _, metric = name.partition("/")
    if domain == "wild" and metric.endswith("_high_frequency") or name.startswith("photos/high_frequency/"):
        return "sharpness"
    if domain == "wild" and metric.endswith("_spread") or name.startswith("photos/spread/"):
        return "spread"
    is_error = domain == "synthetic" and METRICS.get(metric, ("", 0))[1] < 0
    return "forgetting" if is_error or is_agreement(name) else ""


def factors(now, start):
    """Factor of every watched figure since the start; of agreement, that of disagreement. Yields (name, kind, factor).

    now, start  validation figures; one that is not finite (None) or not measured is left out
    """
    for name, value in now.items():
        kind = watched_kind(name)
        if not kind or start.get(name) is None or value is None:
            continue
        if is_agreement(name):
            yield name, kind, (1 - value) / max(1 - start[name], LEAST_ERROR)
        else:
            yield name, kind, value / max(start[name], 1e-12)


def limits(kind, band, forget):
    """Ends of the band of a kind of figure, as factors of the start; None: it may be anything.

    band        factor by which sharpness and spread of maps of photos (wild scenes) may change, either way; 0: any
    forget      share by which a synthetic validation error, or the disagreement with the judge on held-out photos, may
                grow; 0: any
    """
    if kind == "forgetting":
        return (0.0, 1 + forget) if forget else None
    return (1 / band, band) if band else None


def drift(now, start, band, forget):
    """The first figure that has left its band (`limits`) since the start, in words; "" when there is none."""
    for name, kind, factor in factors(now, start):
        ends = limits(kind, band, forget)
        if ends is None or not (factor < ends[0] or factor > ends[1]):
            continue
        if kind != "forgetting":
            return f"{name} is {factor:.2g} x what it was (--band {band:g})"
        way = "fallen" if is_agreement(name) else "grown"
        return f"{name} has {way} from {start[name]:.4g} to {now[name]:.4g} (--forget {forget:g})"
    return ""
