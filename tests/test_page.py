"""evaluation/page.py: report.html of a run, an ablation, a benchmark and a folder of maps; in text and in a browser."""
import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, needs_browser

from data.pictures import save_maps
from evaluation import page, plots, report
from evaluation.page import update_page, write_page
from evaluation.reliability import answer_figures, worst_answers
from relations import MODALITIES, NAMES
from runtime.command import run_command
from runtime.config import PRESETS, Config, plain_settings
from runtime.files import Refusal, write_json, write_rows

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script> &amp; <!--body-->'
SIZE = 16


def some_maps(seed, n=2):
    """Maps in the encodings of the modality table: dict modality -> (n, C, SIZE, SIZE)."""
    rng = torch.Generator().manual_seed(seed)
    found = {m: torch.rand(n, row.channels, SIZE, SIZE, generator=rng) for m, row in MODALITIES.items()}
    return found | dict(rgb=torch.rand(n, 3, SIZE, SIZE, generator=rng), mask=torch.ones(n, 1, SIZE, SIZE) > 0)


def some_answers(maps):
    """As scores.judge_answers, of a judge that is right about the first pair of a photo, wrong about the second."""
    pts = torch.tensor([[[3, 4], [9, 9]], [[2, 8], [12, 5]]]).expand(2, -1, -1, -1)
    return {m: (pts, torch.tensor([[1, -1]] * 2, dtype=torch.int8), torch.tensor([[0.9, 0.7], [0.8, 0.95]]))
            for m in NAMES}


def some_metrics():
    rows = {}
    for i, name in enumerate(page.METRICS):
        change = (i - 4) / 37
        rows[name] = dict(base=0.1 + i / 7, x=0.1 + i / 9, change=change, low=change - 0.061, high=change + 0.0523,
                          verdict=("better", "same", "worse")[i % 3])
    return rows


def log_row(step):
    """A row of GRPO's metrics.jsonl with an evaluation."""
    factor = 1 + step / 200
    rewards = {f"reward/{m}": 0.7 + step / 1000 for m in NAMES}
    return rewards | {f"{k}_spread": 0.01 for k in rewards} | {
        "step": step, "reward": 0.7, "policy/kl": step * 1e-4, "synthetic/depth/abs_rel": 0.1 * factor,
        "wild/depth_high_frequency": 0.05 / factor, "wild/depth_spread": 0.3, "band": 4.0, "forget": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of OUT as train.py leaves it, with names that try to be markup."""
    out = tmp_path_factory.mktemp("run") / "out <b>"
    (out / "grpo").mkdir(parents=True)
    maps = some_maps(0)
    seen = report.save_panel(out / "panel.png", maps["rgb"], {m: some_maps(1)[m] for m in NAMES},
                             {m: some_maps(2)[m] for m in NAMES}, truth=maps, labels=["a.jpg", HOSTILE])
    answers = some_answers(maps)
    table = dict(dataset="wild", n=2, metrics=some_metrics(), judge={f"judge/{m}": 0.5 for m in NAMES},
                 reliability=answer_figures(answers, maps),
                 mistakes=report.save_mistakes(out / "mistakes.safetensors", maps, answers))
    write_json(out / "report.json", dict(about=dict(command=f"train.py --out {HOSTILE}", commit="1a2b3c", device="cpu"),
                                         seed=7, shown=seen, tables=[table]))
    write_rows(out / "grpo" / "metrics.jsonl", [log_row(step) for step in range(0, 40, 10)])
    write_json(out / "grpo" / "run.json", dict(settings=plain_settings(Config(**PRESETS["mini"])), seed=7))
    write_page(out)
    return out


class Tags(HTMLParser):
    """Every tag of a page with its attributes, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def text_of(folder):
    return (folder / "report.html").read_text()


# without a browser --------------------------------------------------------------------------------------------------

def test_a_page_asks_for_nothing(folder):
    text = text_of(folder)
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", text)
    asked = [a[k] for _, a in Tags(text).found for k in ("src", "href", "srcset", "action") if k in a]
    assert len(asked) == 8 and all(x.startswith("data:image/png;base64,") for x in asked)
    assert "default-src 'none'" in text


def test_names_from_files_never_become_markup(folder):
    tags = Tags(text_of(folder)).found
    assert [a for tag, a in tags if tag == "script"] == [{}]
    assert not [a for _, a in tags if any(k.startswith("on") for k in a)] and "b" not in [tag for tag, _ in tags]
    assert [tag for tag, _ in tags].count("main") == 1


def numbers(value):
    """Every number of a JSON value."""
    if isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, (int, float)):
        yield value


def test_every_number_of_the_report_and_of_its_table_is_there(folder):
    text = text_of(folder)
    found = json.loads((folder / "report.json").read_text())
    assert [x for x in numbers(found) if json.dumps(x) not in text] == []
    for row in found["tables"][0]["metrics"].values():
        assert all(f"<td>{x}</td>" in text for x in (f"{row['base']:.4g}", f"{row['x']:.4g}",
                                                     f"{100 * row['change']:+.3g} %"))


def test_an_interval_is_a_bar_whose_ends_are_its_ends(folder):
    bars = re.findall(r'<svg class="bar (\w+)".*?<rect x="([\d.]+)" y=4 width="([\d.]+)"', text_of(folder))
    rows = list(json.loads((folder / "report.json").read_text())["tables"][0]["metrics"].values())
    x0, width = (np.array([float(b[k]) for b in bars]) for k in (1, 2))
    low, high = (np.array([r[k] for r in rows]) for k in ("low", "high"))
    assert [b[0] for b in bars] == [r["verdict"] for r in rows]
    for ends, at in ((low, x0), (high, x0 + width)):                            # one linear scale for all
        fit = np.polyfit(ends, at, 1)
        np.testing.assert_allclose(np.polyval(fit, ends), at, atol=0.2)         # px: a decimal each


def test_the_page_says_what_ran_and_what_differs_from_the_paper(folder):
    text = text_of(folder)
    assert "<dd>1a2b3c</dd>" in text and "<dd>7</dd>" in text and "<dd>31 of 200</dd>" in text
    assert "closest to preset mini" in text
    row = re.search(r"<tr><th scope=row>kl_weight</th>(.*?)</tr>", text)[1]
    paper = plain_settings(Config(**PRESETS["paper"]))["kl_weight"]
    assert re.findall(r">([^<]+)<", row) == ["0.1", "0.1", page.number(paper), "differs"]


def test_curves_have_the_bands_that_end_a_run(folder):
    text = text_of(folder)
    assert text.count('class="band"') == 3 and "sharpness of maps / start, band shaded" in text
    for title in ("reward", "KL to the start", "wild: accuracy by confidence", "wild: accuracy by margin"):
        assert f'aria-label="{title}"' in text


def test_the_surest_mistakes_are_shown_with_what_was_said(folder):
    worst = worst_answers(some_answers(None))
    assert worst == {m: [(1, 1), (0, 1)] for m in NAMES}
    assert "depth: said red (0.950), true is green" in text_of(folder)


def layers_of(text):
    return [json.loads(a["data-layers"]) for tag, a in Tags(text).found if tag == "canvas"]


def values_of(layer):
    levels = np.frombuffer(base64.b64decode(layer["values"]), "<u2").reshape(layer["size"])
    return layer["low"] + layer["step"] * levels


def test_a_picture_holds_the_values_of_the_maps(folder):
    shown = layers_of(text_of(folder))
    assert [[one["name"] for one in layers] for layers in shown] == [["photo", "base", "X", "truth"]] * 8
    for layers, (i, m) in zip(shown, ((i, m) for i in range(2) for m in NAMES), strict=True):
        for layer, seed in zip(layers[1:], (1, 2, 0), strict=True):
            np.testing.assert_allclose(values_of(layer), some_maps(seed)[m][i], atol=1e-5)      # of 65,536 levels


def test_large_maps_are_thinned_to_whole_pixels(tmp_path):
    rgb = torch.rand(1, 3, 300, 200)
    depth = torch.rand(1, 1, 300, 200)
    seen = report.save_panel(tmp_path / "panel.png", rgb, dict(depth=depth), dict(depth=depth))
    write_json(tmp_path / "report.json", dict(shown=seen))
    write_page(tmp_path)
    [layers] = layers_of(text_of(tmp_path))
    assert (tmp_path / "panel.safetensors").stat().st_size < 4.1 * report.VALUES
    np.testing.assert_allclose(values_of(layers[1]), depth[0, :, ::2, ::2], atol=1e-5)
    assert "data-stride=2" in text_of(tmp_path)


def test_a_folder_of_maps_has_a_picture_a_photo(tmp_path):
    for name in ("cat", "a_b"):
        maps = {m: some_maps(3)[m][0] for m in NAMES}
        save_maps(tmp_path, name, some_maps(3)["rgb"][0], maps, maps)
    write_page(tmp_path)
    text = text_of(tmp_path)
    shown = layers_of(text)
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["a_b", "cat"]
    assert [one["name"] for one in shown[0]] == list(NAMES)
    np.testing.assert_allclose(values_of(shown[0][1]), some_maps(3)["normal"][0], atol=4e-5)


def test_an_ablation_and_a_benchmark_are_tables(tmp_path):
    means = json.loads((ROOT / "docs" / "ablation.json").read_text())["means"]
    write_json(tmp_path / "ablation.json", dict(means=means))
    write_page(tmp_path)
    assert text_of(tmp_path).count("<table>") == len(means["all"]) and text_of(tmp_path).count("<svg") > 100
    write_json(tmp_path / "nyu.json", dict(dataset="nyuv2", task="depth", n=3, partial=True, metrics=dict(
        abs_rel=dict(value=5.5, low=5.0, high=6.1, n=3, paper=[dict(base="Marigold", value=5.6, x=5.4)]))))
    text = write_page(tmp_path / "nyu.json").read_text()
    assert "nyuv2, depth: 3 images (partial)" in text and "[5, 6.1]" in text and "Marigold 5.6 → 5.4" in text


def test_photos_without_truth_have_absolute_changes(tmp_path):
    row = dict(base=0.71, x=0.74, change=0.03, low=0.01, high=0.05, verdict="better", n=9)
    write_json(tmp_path / "report.json", {"n": 9, "photos": [], "reward/depth": row})
    assert "<td>+0.03 </td>" in write_page(tmp_path).read_text()


# errors -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("report.json", "{"), ("report.json", '{"tables": 3}'),
    ("report.json", '{"tables": [{"metrics": {"a": {"paper": 3}}}]}'),
    ("report.json", '{"means": {"paper": 7}}'), ("panel.safetensors", "x"), ("metrics.jsonl", '{"step": "x"}\n[]\n')])
def test_damaged_files_are_one_line_and_never_end_a_run(folder, tmp_path, capsys, name, content):
    (tmp_path / "report.json").write_text('{"shown": {"names": ["a"], "stride": 1}}')
    (tmp_path / name).write_text(content)
    with pytest.raises((Refusal, ValueError)):
        write_page(tmp_path)
    update_page(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"no page of {tmp_path}: ")


def test_the_command_names_what_it_wants(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: report.main([str(tmp_path)]), "evaluation.report")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("evaluation.report: got nothing to show") and said.count("\n") == 1
    report.main([str(folder)])
    assert capsys.readouterr().out == f"written: {folder}/report.html\n"


def test_an_evaluation_that_is_not_in_the_log_yet_is_shown(tmp_path):
    update_page(tmp_path, now=log_row(0))
    assert "sharpness of maps" in text_of(tmp_path)


# how it looks -------------------------------------------------------------------------------------------------------

def contrast(one, other):
    """Contrast ratio of two #rgb or #rrggbb colours (WCAG 2)."""
    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        levels = np.array([int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)])
        return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_dark():
    style = page.TEMPLATE.read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 2
    for colours in schemes:
        assert all(contrast(colours[k], colours["ground"]) >= 4.5 for k in ("ink", "soft", "better", "worse"))
        assert all(contrast(c, colours["ground"]) >= 3 for c in plots.COLOURS)


# in a browser -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shown(folder, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.open((folder / "report.html").as_uri(), width=400)
        yield browser


def pixel(browser, row, col):
    """Colour that the first picture shows."""
    return browser.run(f"[...document.querySelector('canvas').getContext('2d').getImageData({col}, {row}, 1, 1).data]")


def picture(layer):
    """Its PNG as (H, W, 3) uint8."""
    import io

    from PIL import Image
    with Image.open(io.BytesIO(base64.b64decode(layer["png"].partition(",")[2]))) as image:
        return np.array(image)


@needs_browser
def test_the_line_moves_by_key_and_divides_before_from_after(folder, shown):
    base, after = (picture(one) for one in layers_of(text_of(folder))[0][1:3])
    shown.run("document.querySelector('.view input').focus()")
    shown.press("Home")
    assert pixel(shown, 5, 0)[:3] == after[5, 0].tolist() != base[5, 0].tolist()
    shown.press("ArrowRight", 3)
    assert pixel(shown, 5, 2)[:3] == base[5, 2].tolist() and pixel(shown, 5, 3)[:3] == after[5, 3].tolist()
    shown.press("End")
    assert pixel(shown, 5, SIZE - 1)[:3] == base[5, SIZE - 1].tolist()


@needs_browser
def test_the_values_under_the_pointer_are_those_of_the_maps(shown):
    x, y = shown.place("canvas")
    side = shown.run("document.querySelector('canvas').clientWidth")
    assert side % SIZE == 0                                                     # a whole factor
    shown.move(x + side / SIZE / 2, y + side / SIZE / 2)
    row = col = SIZE // 2
    said = shown.run("document.querySelector('output').textContent")
    base, after = (float(some_maps(seed)["depth"][0, 0, row, col]) for seed in (1, 2))
    found = re.fullmatch(rf"\({row}, {col}\) base ([\d.]+); X ([\d.]+)", said)
    np.testing.assert_allclose([float(found[1]), float(found[2])], [base, after], rtol=1e-3)


@needs_browser
def test_keys_read_values_and_another_layer_can_be_chosen(shown):
    shown.run("document.querySelectorAll('canvas')[1].focus()")
    shown.press("ArrowUp", 2)
    shown.run("(s => { s.value = 'truth'; s.dispatchEvent(new Event('change')) })(document.querySelector('#right'))")
    said = shown.run("document.querySelectorAll('output')[1].textContent")
    true = some_maps(0)["normal"][0, :, SIZE // 2 - 1, SIZE // 2]
    found = re.fullmatch(rf"\({SIZE // 2 - 1}, {SIZE // 2}\) base .*; truth ([\d. -]+)", said)
    np.testing.assert_allclose([float(v) for v in found[1].split()], true, rtol=1e-3, atol=1e-4)


@needs_browser
def test_no_request_leaves_and_nothing_fails(folder, shown):
    assert shown.requests == [(folder / "report.html").as_uri()] and shown.errors == []
    assert shown.run("[...document.images].every(i => i.complete && i.naturalWidth)")


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_no_width_scrolls_sideways(folder, shown, width):
    shown.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    assert shown.run("document.documentElement.scrollWidth") <= width


@needs_browser
def test_a_screen_reader_finds_a_name_for_every_control(shown):
    shown.call("Accessibility.enable")
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        roles.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert len(roles["slider"]) == 8 and len(roles["combobox"]) == 2
    assert all(name for role in ("slider", "combobox", "image", "img", "region") for name in roles.get(role, ()))
