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
from data.pictures import picture_of, png_address, row_of
from evaluation.drift import factors, limits, watched_kind
from evaluation.intervals import verdict
from evaluation.plots import Line, figure
from evaluation.scores import METRICS
from relations import MODALITIES
from runtime.config import PRESETS, Config, plain_settings
from runtime.files import DamageGuard, find_files, read_checked, read_json, read_log, write_text

TEMPLATE = Path(__file__).with_name("page.html")
VALUES = 3_000_000                # numbers of maps in a page, 16 bits each
PHOTOS = 8                        # of a folder of maps
WORDS = ("photo", "base", "X", "truth")      # layers of a run
POINTS = 100                      # of a curve over the steps
SIDE = 168                        # px to which a small map is enlarged, by a whole factor
BAR = 96                          # px, width of an interval's bar


def write_page(place, now=None):
    """Write the page of a folder, or of a JSON file of eval.py; returns its path.

    now     validation figures of an evaluation that metrics.jsonl does not hold yet
    raises  FileNotFoundError: nothing to show; Refusal: damaged files; OSError
    """
    place = Path(place)
    with DamageGuard(place, "what makes no page", "the files of one command", "run that command again"):
        report, run, rows = read_parts(place, now)
        maps = read_panel(place, report.get("shown")) if report or rows else open_maps(place)
        parts = [tables(report), views(*maps), curves(rows), judge_section(report, place)]
        if report:
            text = html.escape(json.dumps(report, indent=1, ensure_ascii=False))
            parts.append(f"<details><summary>Every number, as JSON</summary><pre tabindex=0>{text}</pre></details>")
        if not any(parts):
            raise FileNotFoundError(f"got nothing to show in {str(place)!r}; want a folder with report.json, "
                                    "ablation.json, metrics.jsonl or maps of predictor.py, or a file of eval.py --json")
        title = html.escape(f"{place.resolve().parent.name}/{place.name}")
        page = TEMPLATE.read_text().replace("<!--title-->", title)
        page = page.replace("<!--body-->", "\n".join([describe_run(report, run, rows), *parts]))
    path = place / "report.html" if place.is_dir() else place.with_suffix(".html")
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
    """A number for people: four digits, a list with commas, "" for none."""
    if isinstance(x, list):
        return ",".join(map(number, x))
    return f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)


def table(caption, header, rows):
    """HTML of a table that scrolls by itself. rows: lists of texts, or of Markup; columns that are empty go."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = ["<tr>" + "".join(f"<th scope=col>{html.escape(header[i])}</th>" for i in used) + "</tr>"]
    for row in rows:
        cells = [row[i] if isinstance(row[i], Markup) else html.escape(str(row[i])) for i in used]
        lines.append(f"<tr><th scope=row>{cells[0]}</th>" + "".join(
            f"<td{' class=text' * c[:1].isalpha()}>{c}</td>" for c in cells[1:]) + "</tr>")
    words = html.escape(caption)
    return (f'<div class=wide tabindex=0 role=region aria-label="{words}"><table><caption>{words}</caption>'
            + "\n".join(lines) + "</table></div>")


class Markup(str):
    """Text that is HTML already."""


def describe_run(report, run, rows):
    """What ran: command, commit, seed, device; how far it is; its settings beside the preset's and the paper's."""
    settings = run.get("settings", {})
    facts = dict(report.get("about") or {k: v for k, v in run.items() if k != "settings"})
    facts |= {k: report[k] for k in ("seed", "seeds", "split") if k in report}
    facts |= dict(steps=f"{rows[-1]['step'] + 1} of {settings.get('steps')}") if rows else {}
    lines = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    text = f"<h2>What ran</h2><dl>{lines}</dl>" if facts else ""
    columns = {name: plain_settings(Config(**PRESETS[name])) for name in PRESETS}
    known = {k: v for k, v in settings.items() if k in columns["paper"]}
    if not known:
        return text
    preset = min(columns, key=lambda name: sum(columns[name][k] != v for k, v in known.items()))
    lines = [(k, *(number(x) or "none" for x in (v, columns[preset][k], columns["paper"][k])),
              "" if v == columns["paper"][k] else "differs") for k, v in known.items()]
    n = sum(bool(line[-1]) for line in lines)
    caption = f"Settings of GRPO, closest to preset {preset}; {n} of {len(lines)} differ from the paper's"
    head = ("setting", "this run", f"preset {preset}", "paper", "")
    return f"{text}<details><summary>{caption}</summary>{table(caption, head, lines)}</details>"


def interval_bar(low, middle, high, reach, word):
    """SVG of an interval around 0, of half width `reach`; the numbers stand beside it."""
    x0, x, x1 = (BAR / 2 + (BAR / 2 - 4) * max(-1, min(1, v / reach)) for v in (low, middle, high))
    return (f'<svg class="bar {html.escape(word)}" viewBox="0 0 {BAR} 14" width={BAR} height=14 aria-hidden=true>'
            f'<path d="M{BAR / 2} 0V14"/><rect x="{x0:.1f}" y=4 width="{max(1, x1 - x0):.1f}" height=6 />'
            f'<path class=middle d="M{x:.1f} 1V13"/></svg>')


def change_table(caption, metrics, relative=True, first="metric"):
    """Table of figures, with a bar for each interval.

    metrics   dict name -> number, or dict: base, x or value, change, its interval low, high (change_low, change_high
              where low, high are the value's), verdict, paper
    relative  changes are shares of the base, shown in percent;  first  head of the column of names
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
        rows.append([name, number(row.get("base")), number(value),
                     f"{scale * change:+.3g} {unit}" if "change" in row and finite(change) else "", "",
                     number(row.get("verdict")), ends, METRICS[name][0] if name in METRICS else "", paper])
    reach = max((abs(x) for span in spans if span for x in span), default=0) or 1
    for row, span in zip(rows, spans, strict=True):
        row[4] = Markup(interval_bar(*span, reach, row[5])) if span else ""
    return table(caption, (first, "before", "after" if any(row[1] for row in rows) else "value", "change", "",
                           "verdict", "95 %", "", "paper: before → after"), rows)


def finite(*values):
    """Whether all are finite numbers."""
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


def tables(report):
    """Before/after tables of any report; "" without one."""
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
        out.append(change_table(f"{metric}: change, mean over seeds", rows, first="row"))
    return f"<h2>Before and after</h2><div class=tables>{''.join(out)}</div>" if out else ""


# maps ---------------------------------------------------------------------------------------------------------------

def stride_for(n, most):
    """The least k such that every k-th row and column of maps with n numbers holds at most `most`."""
    return max(1, math.ceil(math.sqrt(n / most)))


def layer(word, value, picture):
    """What the script draws and reads: a map (C, h, w) as a picture, and its values in 65,536 levels."""
    low = float(value.min())
    step = (float(value.max()) - low) / 65535 or 1.0
    levels = np.round((value.astype(np.float64) - low) / step).astype("<u2")
    return dict(name=word, png=png_address(picture), size=value.shape, low=low, step=step,
                values=base64.b64encode(levels.tobytes()).decode())


def view(title, layers, stride):
    """A picture with a line to move, and the values of a pixel below."""
    _, height, width = layers[0]["size"]
    words = html.escape(title)
    return (f'<figure class=view><figcaption>{words}</figcaption><div class=picture style="width:'
            f'{max(1, SIDE // width) * width}px"><canvas width={width} height={height} tabindex=0 role=img '
            f'aria-label="{words}; arrow keys read values" data-stride={int(stride)} '
            f'data-layers="{html.escape(json.dumps(layers))}"></canvas><i></i></div>'
            f'<input type=range min=0 max={width} value={width // 2} aria-label="{words}: place of the line">'
            '<output>&nbsp;</output></figure>')


def read_panel(folder, shown):
    """Maps of a run: groups [(photo, [(modality, its layers)])], their stride, the two layers to begin with."""
    path = folder / "panel.safetensors"
    if not shown or not path.is_file():
        return [], 1, "", ""
    tensors, _ = read_checked(path)
    groups = []
    for i, name in enumerate(shown["names"]):
        photo = tensors.pop(f"{i}/photo/photo").numpy()
        found = {}
        for key in (k for k in tensors if k.startswith(f"{i}/")):
            _, m, word = key.split("/")
            value = tensors[key].numpy()
            found.setdefault(m, [layer("photo", photo, photo)]).append(layer(word, value, picture_of(m, value)))
        groups.append((name, [(m, sorted(found[m], key=lambda one: WORDS.index(one["name"])))
                              for m in sorted(found, key=table_order)]))
    return groups, shown["stride"], "base", "X"


def open_maps(folder):
    """As read_panel, of maps that predictor.py wrote: one picture a photo, with a layer a map."""
    found = {}
    for path in find_files(folder, "*_*.npy") if folder.is_dir() else ():
        name, _, m = path.stem.rpartition("_")
        if path.with_suffix(".png").is_file() and (name in found or len(found) < PHOTOS):
            found.setdefault(name, {})[m] = decode_npy(path.read_bytes(), str(path))
    stride = stride_for(sum(value.size for maps in found.values() for value in maps.values()), VALUES)
    groups = []
    words = [""]
    for name, maps in found.items():
        layers = []
        for m in sorted(maps, key=table_order):
            is_depth = row_of(m).kind == "distance"                             # its PNG is gray
            picture = picture_of(m, maps[m]) if is_depth else read_rgb(folder / f"{name}_{m}.png").numpy()
            layers.append(layer(m, *(x[:, ::stride, ::stride] for x in (maps[m], picture))))
        groups.append((name, [("", layers)]))
        words = [one["name"] for one in layers]
    return groups, stride, words[0], words[-1]


def table_order(modality):
    """Place of a modality in the table of relations.py; others last."""
    return [*MODALITIES, modality].index(modality)


def views(groups, stride, left, right):
    """Pictures with a line to move and the choice of their layers; "" without any. As read_panel returns them."""
    words = list(dict.fromkeys(one["name"] for _, many in groups for _, layers in many for one in layers))
    if not words:
        return ""
    choose = "".join(f"<label>{side} of the line <select id={side}>" + "".join(
        f"<option{' selected' * (w == chosen)}>{html.escape(w)}</option>" for w in words) + "</select></label>"
        for side, chosen in (("left", left), ("right", right)))
    note = f" Of every {stride} rows and columns one is here, with its own values." if stride > 1 else ""
    out = ["<h2>Maps</h2><p>Move the line. Point at a pixel, or focus a picture and use the arrow keys, to read the "
           f"values at (row, column).{note}</p><p class=choose>{choose}</p><noscript>Needs JavaScript.</noscript>"]
    for name, many in groups:
        shown = (view(f"{m} of {name}" if m else name, layers, stride) for m, layers in many)
        out.append(f"<h3>{html.escape(name)}</h3><div class=row>{''.join(shown)}</div>")
    return "".join(out)


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


def judge_section(report, folder):
    """Calibration, accuracy by margin and the surest mistakes of a judge; "" where nothing is known of it."""
    parts = report.get("tables", [report])
    out = []
    for part in parts:
        name = str(part.get("dataset"))
        figures = {m: f for m, f in part.get("reliability", part.get("judge", {})).items() if isinstance(f, dict)}
        charts = []
        for kind, x, label in (("bins", "confidence", "confidence"), ("margins", "low", "margin, lower edge")):
            lines = [Line(m, [b[x] for b in f[kind]], [b["accuracy"] for b in f[kind]])
                     for m, f in figures.items() if kind in f]
            ideal = [Line("ideal", [0.5, 1.0], [0.5, 1.0])] if lines and kind == "bins" else []
            charts.append(chart(f"{name}: accuracy by {x if ideal else 'margin'}", label, [*lines, *ideal]))
        out.append(f"<div class=row>{''.join(charts)}</div>" if any(charts) else "")
    if (folder / "mistakes.safetensors").is_file():
        pictures, _ = read_checked(folder / "mistakes.safetensors")
        figures = [mistake(name, one, pictures[name].numpy() / 255)
                   for part in parts for name, one in part.get("mistakes", {}).items()]
        out.append(f"<h3>Its surest mistakes</h3><div class=row>{''.join(figures)}</div>" if figures else "")
    return "\n".join(["<h2>The judge</h2>", *out]) if any(out) else ""


def mistake(name, one, picture):
    """A photo with markers, and what the judge said of them. name, one: as report.save_mistakes returns them."""
    sure = max(one["prob"], 1 - one["prob"])
    words = html.escape(f"{name.partition(' ')[0]}: said {one['said']} ({sure:.3f}), true is {one['truth']}")
    side = max(1, SIDE // picture.shape[2]) * picture.shape[2]
    return (f'<figure><img width={side} alt="photo {html.escape(str(one["photo"]))} with a red and a green marker" '
            f'src="{png_address(picture)}"><figcaption>{words}</figcaption></figure>')
