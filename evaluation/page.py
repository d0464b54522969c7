"""report.html: what a command left in a folder, to look at. One file that asks for nothing: it opens anywhere.

A page is made of these files alone; what is not there is left out:
    report.json, ablation.json       of train.py, of bench.ablate; or a file of eval.py --json: tables, the judge
    panel.safetensors                of evaluation/report.py: maps before and after, true maps
    mistakes.safetensors             of the same: photos with markers of which the judge was wrong
    metrics.jsonl, run.json          of GRPO, in the folder or in grpo/ below it: curves and their bands, settings
    NAME_depth.npy, NAME_depth.png   of predictor.py, where there is no table: maps of your photos
Style and script stand in page.html. Every text from a file is escaped, pictures are PNGs in data: addresses.
"""
import base64
import html
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from data.formats import decode_npy
from data.photos import read_rgb
from data.pictures import picture_of, png_bytes, row_of
from evaluation.drift import factors, limits, watched_kind
from evaluation.intervals import verdict
from evaluation.plots import Line, figure
from evaluation.scores import METRICS
from relations import MODALITIES
from runtime.config import PRESETS, Config, plain_settings
from runtime.files import DamageGuard, decode_json, find_files, read_checked, read_json, read_log, write_text

TEMPLATE = Path(__file__).with_name("page.html")
VALUES = 1_000_000                # numbers of maps in a page, 16 bits each
PHOTOS = 8                        # of a folder of maps
POINTS = 100                      # of a curve over the steps
SIDE = 168                        # px to which a small map is enlarged, by a whole factor
BAR = 132                         # px, width of an interval's bar


def write_page(place, now=None):
    """Write the page of a folder, or of a JSON file of eval.py; returns its path.

    now     validation figures of an evaluation that metrics.jsonl does not hold yet
    raises  FileNotFoundError: nothing to show; Refusal: damaged files; OSError
    """
    place = Path(place)
    folder = place if place.is_dir() else None
    with DamageGuard(place, "what makes no page", "the files of one command", "run that command again"):
        report, run, rows = read_parts(place, now)
        parts = [describe_run(report, run, rows), *tables(report)]
        parts += views_of(folder, is_maps=not report and not rows) if folder else []
        parts += [curves(rows), judge_part(report, folder)]
        if report:
            text = html.escape(json.dumps(report, indent=1, ensure_ascii=False))
            parts.append(f"<details><summary>Every number, as JSON</summary><pre tabindex=0>{text}</pre></details>")
        if not any(parts[1:]):
            raise FileNotFoundError(f"got nothing to show in {str(place)!r}; want a folder with report.json, "
                                    "ablation.json, metrics.jsonl or maps of predictor.py, or a file of eval.py --json")
        title = html.escape(f"{place.resolve().parent.name}/{place.name}")
        page = TEMPLATE.read_text().replace("TITLE", title).replace("BODY", "\n".join(filter(None, parts)))
    path = folder / "report.html" if folder else place.with_suffix(".html")
    write_text(path, page)
    return path


def update_page(place, now=None, say=False):
    """As write_page, for commands to which the page is not what matters: an error is one line on stderr.

    say  print where the page lies
    """
    try:
        path = write_page(place, now)
    except (OSError, ValueError) as error:
        print(f"no page of {place}: {error}", file=sys.stderr, flush=True)
    else:
        if say:
            print(f"look at it: {path}", flush=True)


def read_parts(place, now=None):
    """What a page is made of: the report, {} without one; GRPO's run.json, {}; the rows of its log, []."""
    if not place.is_dir():
        return read_json(place), {}, []
    found = next((place / name for name in ("report.json", "ablation.json") if (place / name).is_file()), None)
    folder = next((f for f in (place, place / "grpo") if (f / "run.json").is_file()), place)
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    return read_json(found) if found else {}, run, read_log(folder / "metrics.jsonl") + ([now] if now else [])


# words and tables ---------------------------------------------------------------------------------------------------

def number(x):
    """A number for people: four digits; "" for none."""
    return f"{x:.4g}" if isinstance(x, (int, float)) else "" if x is None else str(x)


def table(caption, header, rows):
    """HTML of a table that scrolls by itself. rows: lists of texts, or of Markup; columns that are empty go."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = ["<tr>" + "".join(f"<th scope=col>{html.escape(header[i])}</th>" for i in used) + "</tr>"]
    for row in rows:
        cells = [row[i] if isinstance(row[i], Markup) else html.escape(str(row[i])) for i in used]
        lines.append(f"<tr><th scope=row>{cells[0]}</th>" + "".join(f"<td>{c}</td>" for c in cells[1:]) + "</tr>")
    words = html.escape(caption)
    return (f'<div class=wide tabindex=0 role=region aria-label="{words}"><table><caption>{words}</caption>'
            + "\n".join(lines) + "</table></div>")


class Markup(str):
    """Text that is HTML already."""


def describe_run(report, run, rows):
    """What ran: command, commit, seed, device; how far it is; its settings beside the preset's and the paper's."""
    about = report.get("about") or {k: v for k, v in run.items() if k != "settings"}
    facts = dict(about)
    facts |= {k: report[k] for k in ("seed", "seeds", "split") if k in report}
    settings = run.get("settings", {})
    if rows:
        facts["steps"] = f"{rows[-1]['step'] + 1} of {settings.get('steps', '?')}"
    lines = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    text = f"<h2>What ran</h2><dl>{lines}</dl>"
    columns = {name: plain_settings(Config(**PRESETS[name])) for name in PRESETS}
    known = {k: v for k, v in settings.items() if k in columns["paper"]}
    if not known:
        return text
    preset = min(columns, key=lambda name: sum(columns[name][k] != v for k, v in known.items()))
    lines = [(k, setting(v), setting(columns[preset][k]), setting(columns["paper"][k]),
              "" if v == columns["paper"][k] else "differs") for k, v in known.items()]
    n = sum(bool(line[-1]) for line in lines)
    caption = f"Settings of GRPO, closest to preset {preset}; {n} of {len(lines)} differ from the paper's"
    return (text + f"<details><summary>{caption}</summary>"
            + table(caption, ("setting", "this run", f"preset {preset}", "paper", ""), lines) + "</details>")


def setting(value):
    """A setting's value as the command line writes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value == "" else str(value)


def interval_bar(low, middle, high, reach, word):
    """SVG of an interval around 0, of half width `reach`; the numbers stand beside it."""
    x0, x, x1 = (BAR / 2 + (BAR / 2 - 4) * max(-1, min(1, v / reach)) for v in (low, middle, high))
    return (f'<svg class="bar {html.escape(word)}" viewBox="0 0 {BAR} 14" width={BAR} height=14 aria-hidden=true>'
            f'<path d="M{BAR / 2} 0V14"/><rect x="{x0:.1f}" y=4 width="{max(1, x1 - x0):.1f}" height=6 />'
            f'<path class=middle d="M{x:.1f} 1V13"/></svg>')


def change_table(caption, metrics, relative=True):
    """Table of figures, with a bar for each interval.

    metrics   dict name -> number, or dict: base, x or value, change, its interval low, high (change_low, change_high
              where low, high are the value's), verdict, paper
    relative  changes are shares of the base, shown in percent
    """
    rows = []
    spans = []
    unit, scale = ("%", 100) if relative else ("", 1)
    for name, row in metrics.items():
        row = row if isinstance(row, dict) else dict(x=row)
        value = row.get("x", row.get("value"))
        change, low, high = (row.get(k) for k in ("change", "change_low" if "change_low" in row else "low",
                                                  "change_high" if "change_high" in row else "high"))
        ends = f"[{low:.4g}, {high:.4g}]" if finite(low, high) else ""
        if finite(low, high, value) and "change" not in row and value:          # of one value: around it
            change, low, high = 0.0, low / value - 1, high / value - 1
        elif finite(low, high):
            ends = f"[{scale * low:+.3g}, {scale * high:+.3g}]"
        spans.append((low, change, high) if finite(low, change, high) else None)
        paper = "; ".join(f"{p['base']} {number(p['value'])} → {number(p['x'])}" for p in row.get("paper", ()))
        rows.append([name, METRICS[name][0] if name in METRICS else "", number(row.get("base")), number(value),
                     f"{scale * change:+.3g} {unit}" if "change" in row and finite(change) else "", ends,
                     row.get("verdict", ""), paper])
    reach = max((abs(x) for span in spans if span for x in span), default=0) or 1
    for row, span in zip(rows, spans, strict=True):
        row.insert(6, Markup(interval_bar(*span, reach, row[6])) if span else "")
    return table(caption, ("metric", "", "before", "after" if any(row[2] for row in rows) else "value", "change",
                           "95 %", "", "verdict", "paper: before → after"), rows)


def finite(*values):
    """Whether all are finite numbers."""
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


def tables(report):
    """Before/after tables of any report, as HTML texts."""
    out = []
    for part in report.get("tables", [report]):
        if isinstance(part.get("metrics"), dict):
            name = ", ".join(str(part[k]) for k in ("dataset", "task") if part.get(k))
            out.append(change_table(f"{name}: {part.get('n')} images" + " (partial)" * bool(part.get("partial")),
                                    part["metrics"]))
        accuracy = part.get("judge", {})
        if accuracy and all(map(finite, accuracy.values())):
            names = list(dict.fromkeys(k.partition("/")[2] for k in accuracy))
            who = ("judge", "predictor", "heuristic")
            out.append(table(f"{part.get('dataset')}: accuracy on the judge's pairs", ("modality", *who),
                             [(m, *(number(accuracy.get(f"{w}/{m}")) for w in who)) for m in names]))
    figures = {k: v for k, v in report.items() if isinstance(v, dict) and {"base", "x", "low"} <= v.keys()}
    if figures:
        out.append(change_table(f"{report.get('n')} photos on which nothing was trained", figures, relative=False))
    means = report.get("means", {})
    for metric in dict.fromkeys(k for row in means.values() for k in row):
        rows = {}
        for name, row in means.items():
            mean, half = row.get(metric) or (None, None)
            ends = (mean - half, mean + half) if finite(mean, half) else (math.nan, math.nan)
            better = METRICS.get(metric.partition("/")[2], ("", 0))[1]
            rows[name] = dict(change=mean, low=ends[0], high=ends[1],
                              verdict=verdict(*ends, better) if finite(*ends) and better else "")
        out.append(change_table(f"{metric}: change, mean over seeds", rows))
    return ["<h2>Before and after</h2>", f"<div class=tables>{''.join(out)}</div>"] if out else []


# maps ---------------------------------------------------------------------------------------------------------------

def stride_for(n, most):
    """The least k such that every k-th row and column of maps with n numbers holds at most `most`."""
    return max(1, math.ceil(math.sqrt(n / most)))


def data_address(image):
    """data: address of the PNG of a (3, h, w) array in [0, 1]."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def layer(word, value, picture):
    """What the script draws and reads: a map (C, h, w) as a picture, and its values in 65,536 levels."""
    low = float(value.min())
    step = (float(value.max()) - low) / 65535 or 1.0
    levels = np.round((value.astype(np.float64) - low) / step).astype("<u2")
    return dict(name=word, png=data_address(picture), size=value.shape, low=low, step=step,
                values=base64.b64encode(levels.tobytes()).decode())


def view(title, layers, stride, left, right):
    """HTML of a picture with a line to move: the layer `left` before it, `right` behind it, values below."""
    _, height, width = layers[0]["size"]
    words = html.escape(title)
    return (f'<figure class=view><figcaption>{words}</figcaption><div class=picture style="width:'
            f'{max(1, SIDE // width) * width}px"><canvas width={width} height={height} tabindex=0 role=img '
            f'aria-label="{words}; arrow keys read values" data-stride={stride} data-left="{html.escape(left)}" '
            f'data-right="{html.escape(right)}" data-layers="{html.escape(json.dumps(layers))}"></canvas><i></i></div>'
            f'<input type=range min=0 max={width} value={width // 2} aria-label="{words}: place of the line">'
            '<output>&nbsp;</output></figure>')


def views_of(folder, is_maps):
    """Pictures with a line to move, as HTML texts: of panel.safetensors, or of a folder of maps of predictor.py."""
    groups, stride, left, right = [], 1, "base", "X"
    path = folder / "panel.safetensors"
    if path.is_file() and not is_maps:
        tensors, header = read_checked(path)
        stride = int(header["stride"])
        names = decode_json(header["names"].encode(), str(path))
        for i, name in enumerate(names):
            photo = tensors[f"{i}/photo/photo"].numpy()
            found = {}
            for key in (k for k in tensors if k.startswith(f"{i}/") and "/photo/" not in k):
                _, m, word = key.split("/")
                found.setdefault(m, {"photo": layer("photo", photo, photo)})[word] = layer(
                    word, tensors[key].numpy(), picture_of(m, tensors[key].numpy()))
            order = sorted(found, key=lambda m: (m not in MODALITIES, [*MODALITIES, m].index(m)))
            groups.append((name, [(m, [found[m][w] for w in ("photo", "base", "X", "truth") if w in found[m]])
                                  for m in order]))
    elif is_maps:
        groups, stride, left, right = map_groups(folder)
    words = list(dict.fromkeys(one["name"] for _, many in groups for _, layers in many for one in layers))
    if not words:
        return []
    choose = "".join(f'<label>{side} of the line <select id={side}>' + "".join(
        f"<option{' selected' * (w == chosen)}>{html.escape(w)}</option>" for w in words) + "</select></label>"
        for side, chosen in (("left", left), ("right", right)))
    note = f" Every {stride}th pixel is here, as it is." if stride > 1 else ""
    out = ["<h2>Maps</h2>", f"<p>Move the line; point at a pixel, or focus a picture and use the arrow keys, to read its "
           f"value (row, column).{note}</p><p class=choose>{choose}</p><noscript>Needs JavaScript.</noscript>"]
    for name, many in groups:
        out.append(f"<h3>{html.escape(name)}</h3><div class=row>"
                   + "".join(view(f"{m} of {name}" if m else name, layers, stride, left, right) for m, layers in many)
                   + "</div>")
    return out


def map_groups(folder):
    """Maps that predictor.py wrote: a group a photo, of one picture with a layer a map; stride; the first two names."""
    found = {}
    for path in find_files(folder, "*_*.npy"):
        name, _, m = path.stem.rpartition("_")
        value = decode_npy(path.read_bytes(), str(path))
        if value.ndim == 3 and path.with_suffix(".png").is_file() and (name in found or len(found) < PHOTOS):
            found.setdefault(name, {})[m] = (value, path.with_suffix(".png"))
    stride = stride_for(sum(value.size for maps in found.values() for value, _ in maps.values()), VALUES)
    groups = []
    for name, maps in found.items():
        layers = []
        for m in sorted(maps, key=lambda m: [*MODALITIES, m].index(m)):
            value, path = maps[m]
            picture = picture_of(m, value) if row_of(m).kind == "distance" else read_rgb(path).numpy()
            layers.append(layer(m, value[:, ::stride, ::stride], picture[:, ::stride, ::stride]))
        groups.append((name, [("", layers)]))
    words = [one["name"] for one in groups[0][1][0][1]] if groups else [""]
    return groups, stride, words[0], words[-1]


# curves and the judge -----------------------------------------------------------------------------------------------

def chart(title, label, lines, band=None):
    """A plot for the page, readable by its title; "" without a point."""
    lines = [one for one in lines if one.x]
    if not lines:
        return ""
    text = figure([(title, label, lines, band)], 1)
    return text.replace('<svg xmlns="http://www.w3.org/2000/svg"',
                        f'<svg class=chart role=img aria-label="{html.escape(title)}"', 1)


def smooth_line(name, label, rows):
    """A figure over the steps; of more than POINTS rows means of neighbours."""
    points = [(row["step"] + 1, row[name]) for row in rows if finite(row.get(name))]
    size = max(1, math.ceil(len(points) / POINTS))
    chunks = [points[i:i + size] for i in range(0, len(points), size)]
    return Line(label, *([float(np.mean([p[k] for p in chunk])) for chunk in chunks] for k in (0, 1)))


def curves(rows):
    """Reward, KL and what watch.py watches over the steps, with the bands in which a run may move; "" without a log."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    rewards = [k for k in names if re.fullmatch(r"reward(/[a-z]+)?", k)]
    charts = [chart("reward", "step", [smooth_line(k, k.partition("/")[2] or "mean", rows) for k in rewards]),
              chart("KL to the start", "step", [smooth_line("policy/kl", "KL", rows)]),
              chart("spread of rewards in a group", "step",
                    [smooth_line(f"{k}_spread", k.partition("/")[2], rows) for k in rewards if "/" in k])]
    seen = [row for row in rows if any(map(watched_kind, row))]
    bands = next(((row["band"], row["forget"]) for row in seen[::-1] if "band" in row), (0, 0))
    for kind, title in (("sharpness", "sharpness of maps"), ("spread", "spread of maps"), ("forgetting", "errors")):
        points = {}
        for row in seen:
            for name, _, factor in (f for f in factors(row, seen[0]) if f[1] == kind):
                points.setdefault(name, []).append((row["step"] + 1, factor))
        lines = [Line(re.sub(r"^[a-z]+/|_?(high_frequency|spread)/?", "", name), *map(list, zip(*at, strict=True)))
                 for name, at in points.items()]
        band = limits(kind, *bands)
        charts.append(chart(f"{title} / start" + ", band shaded" * bool(band), "step", lines, band))
    text = "".join(filter(None, charts))
    return f"<h2>Over the steps</h2><div class=row>{text}</div>" if text else ""


def judge_part(report, folder):
    """Calibration, accuracy by margin and the surest mistakes of a judge; "" where nothing is known of it."""
    parts = report.get("tables", [report])
    found = {part.get("dataset"): part.get("reliability", part.get("judge", {})) for part in parts}
    out = []
    for name, figures in found.items():
        figures = {m: f for m, f in figures.items() if isinstance(f, dict) and f.get("bins")}
        if figures:
            ideal = Line("ideal", [0.5, 1.0], [0.5, 1.0])
            lines = [Line(m, [b["confidence"] for b in f["bins"]], [b["accuracy"] for b in f["bins"]])
                     for m, f in figures.items()]
            out += [f"<h3>{html.escape(str(name))}</h3>",
                    table(f"{name}: the judge's answers", ("modality", "n", "accuracy", "undecided", "ECE"),
                          [(m, *(number(f.get(k)) for k in ("n", "accuracy", "undecided", "ece")))
                           for m, f in figures.items()]),
                    "<div class=row>", chart(f"{name}: accuracy by confidence", "confidence", [ideal, *lines]),
                    chart(f"{name}: accuracy by margin", "margin, lower edge", [
                        Line(m, [b["low"] for b in f["margins"]], [b["accuracy"] for b in f["margins"]])
                        for m, f in figures.items()]), "</div>"]
    mistakes = next((part["mistakes"] for part in parts if part.get("mistakes")), {})
    if mistakes and folder and (folder / "mistakes.safetensors").is_file():
        pictures, _ = read_checked(folder / "mistakes.safetensors")
        out += ["<h3>Its surest mistakes</h3><div class=row>"]
        for name, one in mistakes.items():
            picture = pictures[name].numpy() / 255
            prob = one["prob"] if one["prob"] > 0.5 else 1 - one["prob"]
            words = html.escape(f"{name.partition(' ')[0]}: said {one['said']} ({prob:.3f}), true is {one['truth']}")
            side = max(1, SIDE // picture.shape[2]) * picture.shape[2]
            out.append(f'<figure><img width={side} alt="photo {html.escape(str(one["photo"]))} with markers" '
                       f'src="{data_address(picture)}"><figcaption>{words}</figcaption></figure>')
        out.append("</div>")
    return "\n".join(["<h2>The judge</h2>", *out]) if out else ""
