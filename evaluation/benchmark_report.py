"""The table and the pictures of a public benchmark, with the paper's numbers beside ours; the state of its files."""
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.pictures import panel, save_png
from evaluation import benchmarks, predictions, protocols
from evaluation.benchmark_table import (
    ABOUT,
    ALIGNMENTS,
    BENCHMARKS,
    DA2K,
    MissingData,
    align_benchmark,
    choose_benchmarks,
    missing_page,
)
from evaluation.intervals import bootstrap_interval, verdict
from evaluation.report import compared_paths, format_interval, format_number, print_table


def check_problems(bench, source, rows, items):
    """Warnings to print with the numbers.

    raises  ValueError: most saved depth maps run the other way, or saved normals have other axes
    """
    lines = protocols.find_problems(bench, rows, [item["name"] for item in items])
    if source.saved and sum(r.get("scale", 1) < 0 for r in rows) > len(rows) / 2:
        want = ("disparity, larger is closer; score depths with --align depth" if bench.align == "disparity" else
                "depth, larger is farther; score disparities with --align disparity")
        raise ValueError(f"{source.label}: {lines[0]}; want {want}")
    if source.saved and bench.task == "normal" and lines:
        raise ValueError(f"{source.label}: {lines[0]}")
    return lines


def benchmark_figures(values, weights, times, old, better):
    """Numbers of one metric: value and interval, and where `old` is given the base, the relative change, the verdict.

    values, weights  (N,) of the images, NaN where an image has no value; an infinite PSNR counts
    times            factor between the mean and the printed number
    old              (N,) of the base, or None;  better: sign of the good direction
    """
    known = ~np.isnan(values)
    value = times * float(np.average(values[known], weights=weights[known]))
    low = high = np.nan
    if known.sum() > 1 and np.isfinite(value):                                  # one image has no spread
        low, high = (times * x for x in bootstrap_interval(values[known], weights=weights[known])[1:])
    row = dict(n=int(known.sum()), value=value, low=low, high=high)
    if old is None:
        return row
    both = known & ~np.isnan(old)
    change = low = high = np.nan
    if both.any() and old[both].any() and np.isfinite([*old[both], *values[both]]).all():
        change, low, high = bootstrap_interval(old[both], values[both], relative=True, weights=weights[both])
        if both.sum() == 1:
            low = high = np.nan
    before = float(times * np.average(old[both], weights=weights[both])) if both.any() else np.nan
    return row | dict(base=before, change=change, change_low=low, change_high=high, verdict=verdict(low, high, better))


def _cells(row, paper):
    """Cells of a table's line from a row of `benchmark_figures`; paper: [(base, its number, X's number)]."""
    cells = [format_number(row["value"])]
    if "base" in row:
        cells = [format_number(row["base"]), *cells, f"{100 * row['change']:+.1f} %",
                 format_interval(100 * row["change_low"], 100 * row["change_high"]), row["verdict"]]
    else:
        cells.append(format_interval(row["low"], row["high"]))
    return [*cells, "; ".join(f"{who} {a:g} -> {b:g}" for who, a, b in paper) or "-"]


def report_benchmark(bench, source, rows, base, base_rows, lines, n_expected):
    """Print one benchmark's table; returns every printed number.

    source, base         predictions.Source of the evaluated maps and of those they are compared with (or None)
    rows, base_rows      their values per image, in the same order
    lines                warnings;  n_expected  images of the official protocol
    """
    values = protocols.metric_values(bench, rows)
    if not values:
        raise ValueError(f"{bench.dataset}: got no judgement that counts in any of {len(rows)} images, want one; "
                         "evaluate more images")
    olds = protocols.metric_values(bench, base_rows) if base_rows else {}
    n = len(rows)
    partial = bool(n_expected) and n != n_expected
    print(f"\n{bench.dataset}, {bench.task}: {n} images evaluated of {n_expected or n} expected"
          + (f"   *** PARTIAL: {n} of {n_expected}, not the benchmark's number ***" if partial else ""))
    print(f"  protocol: {bench.protocol}\n  predictions: {source.label}")
    if base:
        print(f"  base: {base.label}; change relative, paired bootstrap 95 % interval")
    how = ALIGNMENTS[bench.align][0] if bench.task == "depth" else ""
    title = ", ".join(filter(None, (bench.dataset, bench.task, how)))
    result = {}
    table_rows = []
    for name, v in values.items():
        text, better, times = protocols.MEASURES[bench.task][name]
        text = ", ".join(filter(None, (text, how)))
        paper = protocols.paper_numbers(bench, name)
        old = olds.get(name, np.full(len(v), np.nan)) if base else None
        row = benchmark_figures(v, protocols.image_weights(name, rows), times, old, better)
        table_rows.append((name, text if row["n"] in (0, n) else f"{text} ({row['n']} images)", *_cells(row, paper)))
        row["paper"] = [dict(base=who, value=a, x=b) for who, a, b in paper]
        row |= dict(align=bench.align) if how else {}
        result[name] = {k: "inf" if isinstance(x, float) and x == np.inf else x for k, x in row.items()}
    head = ("base", "X", "change", "95 %", "") if base else ("value", "95 %")
    print_table(title, table_rows, ("metric", "", *head, "the paper's base -> X"))
    for line in lines:
        print(f"  !! {line}")
    if partial:
        print(f"  !! PARTIAL: {n} of {n_expected} images; do not compare with published numbers")
    return dict(dataset=bench.dataset, task=bench.task, n=n, expected=n_expected, partial=partial,
                protocol=bench.protocol, align=bench.align if how else None, predictions=source.label,
                base=base.label if base else None, warnings=lines, metrics=result)


def save_benchmark_panel(bench, source, files, items, rows, n, path):
    """Write a picture of the best, the worst, the second best ... image by the first metric; they are predicted again.

    rows  values per image;  n  images in the picture
    """
    name, (_, better, _) = next(iter(protocols.MEASURES[bench.task].items()))
    known = [i for i, r in enumerate(rows) if r.get(name) is not None]
    order = sorted(known, key=lambda i: -better * rows[i][name])
    picked = [i for pair in zip(order, order[::-1], strict=True) for i in pair]
    tiles = []
    for rank, i in enumerate(list(dict.fromkeys(picked))[:n]):
        sample = source.read(bench, files, items[i])
        pred = source.predict(bench, sample)
        sample["photos"] = benchmarks.load_sample(bench, files, items[i])["photos"]             # at full size
        shown = protocols.result_pictures(bench, pred, sample)
        title = f"{'best' if rank % 2 == 0 else 'worst'}: {name} {format_number(rows[i][name])}, {items[i]['name']}"
        tiles += [(title, shown[0][1]), *shown[1:]]
    if tiles:
        print(f"  pictures: {save_png(path, panel(tiles, len(shown)))}")


def open_benchmark(bench, path, limit, out=None):
    """Files and images of a benchmark that can be evaluated, at most `limit` of them (0: all).

    out      folder that the command writes to
    returns  Files, items, number of images that the protocol expects, warnings about images that were left out
    raises   MissingData: a file is missing and there is no limit
    """
    files, items, missing = benchmarks.find_data(bench, path, out)
    there = [item for item in items if benchmarks.is_complete(files, item)]
    if missing and not limit:
        raise MissingData(f"--data {path}: got {len(there)} of {len(items)} images of {bench.dataset} "
                          f"(first missing: {missing[0]}), want all; --limit N takes what is there",
                          missing_page(bench, missing))
    there = there[:limit or None]
    passed = items[:items.index(there[-1])] if len(there) == limit else items
    skipped = [item["name"] for item in passed if not benchmarks.is_complete(files, item)]
    lines = [f"{len(skipped)} incomplete images were skipped (first: {skipped[0]})"] if skipped else []
    return files, there, bench.count or len(items), lines


def report_benchmarks(args):
    """The tables of a public benchmark. Missing files are reported before a network is opened.

    args     of the command line: dataset, task, align, data, limit, out, checkpoint, compare, pred_dir, panels, and
             what predictions.py reads
    returns  every printed number
    raises   MissingData; ValueError: damaged files, predictions that do not fit
    """
    chosen = [align_benchmark(bench, args.align) for bench in choose_benchmarks(args.dataset, args.task)]
    opened = [(bench, *open_benchmark(bench, args.data, args.limit, args.out)) for bench in chosen]
    new, old = compared_paths(args)
    sources = [(predictions.saved_source if args.pred_dir else predictions.find_source)(new, args)]
    sources += [predictions.find_source(old, args)] if old else []
    results = []
    refused = ""
    for bench, files, items, n_expected, lines in opened:
        reason = next((why for why in (s.lacks(bench, items) for s in sources) if why), "")
        if reason:
            refused = refused or reason
            print(f"{bench.dataset}, {bench.task}: left out: {reason}")
            continue
        rows = []
        for s in sources:
            path = predictions.results_file(bench, s, files, items, args.out)
            rows.append(predictions.evaluate_images(bench, s, files, items, path))
            lines += [f"{s.label}: {line}" if old else line for line in check_problems(bench, s, rows[-1], items)]
        base = sources[1] if old else None
        base_rows = rows[1] if old else None
        results.append(report_benchmark(bench, sources[0], rows[0], base, base_rows, lines, n_expected))
        if args.panels:
            path = Path(args.out, "eval", f"{bench.dataset}-{bench.task}.png")
            save_benchmark_panel(bench, sources[0], files, items, rows[0], args.panels, path)
    if not results:
        raise ValueError(refused)
    return results[0] if len(results) == 1 else dict(dataset=args.dataset, tables=results)


def check_data(args):
    """Count and decode a benchmark's files. args: dataset, task, data, limit of the command line.

    raises  ValueError at the first bad file, MissingData for absent ones
    """
    result = []
    for bench in choose_benchmarks(args.dataset, args.task):
        files, items, missing = benchmarks.find_data(bench, args.data, args.out)
        there = [item for item in items if benchmarks.is_complete(files, item)][:args.limit or None]
        size = sum(max(0, files.size(f)) for item in there for f in benchmarks.item_files(item))
        print(f"{bench.dataset}, {bench.task}: {len(there)} of {bench.count or len(items)} images complete in "
              f"{files.path}, {size / 1e9:.3f} GB", flush=True)
        for item in tqdm(there, desc="decode", disable=len(there) < 3):
            benchmarks.load_sample(bench, files, item, axes=True)
        print(f"  {len(there)} images decoded, none is bad")
        if missing and not args.limit:
            raise MissingData(f"--data {args.data}: {len(missing)} files of {bench.dataset} are missing "
                              f"(first: {missing[0]})", missing_page(bench, missing))
        result.append(dict(dataset=bench.dataset, task=bench.task, n=len(there), expected=bench.count or len(items),
                           bytes=size))
    return result[0] if len(result) == 1 else dict(dataset=args.dataset, tables=result)


def list_datasets(procedural):
    """Print every data set with its task, count, licence and source."""
    print("dataset         task      images  needs                source; licence")
    for b in (*BENCHMARKS, DA2K):
        source, licence, _ = ABOUT[b.dataset, b.task]
        print(f"{b.dataset:15} {b.task:9} {b.count or '-':>6}  {', '.join(b.needs):20} {source}; {licence}")
    print(f"{'scenes':15} {'all four':9} {'-':>6}  {'all four':20} your folder of ID_rgb.png, ID_depth.png, ...")
    for name in procedural:
        print(f"{name:15} {'all four':9} {'-':>6}  {'all four':20} rendered by data/scenes.py")
