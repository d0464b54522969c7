"""ask.py: the page answers as the judge's command does, in a browser too; it serves its own page alone, writes nothing.

The tests in a browser are skipped where there is no chromium.
"""
import http.client
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import served_stub
import torch
from browser import Browser, needs_browser
from expect import seeded, strict
from PIL import Image

import judge as judging
from data.orders import BothOrders
from data.photos import read_rgb
from evaluation import ask
from judge import load_judge, see_pair
from predictor import load_predictor, predict_photo
from relations import NAMES, margin, relation

HERE = Path(__file__).parent
JUDGE, PREDICTOR = HERE / "fixtures" / "judge", HERE / "fixtures" / "predictor"
RED, GREEN = [3, 4], [30, 20]
QUESTION = dict(photo="a.png", red=RED, green=GREEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two photos of 40 x 28 px, and a link to a third outside."""
    place = tmp_path_factory.mktemp("ask") / "photos"
    (place / "sub").mkdir(parents=True)
    for name, seed in (("a.png", 0), ("sub/<b>.png", 1), ("../secret.png", 2)):
        pixels = torch.randint(0, 256, (28, 40, 3), generator=seeded(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / name)
    (place / "link.png").symlink_to(place.parent / "secret.png")
    return place


@pytest.fixture(scope="module")
def server(folder):
    """The page of a mini judge and a mini predictor, served by a thread."""
    made = ask.open_server(0)
    made.desk = ask.Desk(load_judge(JUDGE), load_predictor(PREDICTOR), str(folder))
    made.about = dict(judge="J", predictor="P", size=16, photos=made.desk.photos, most=max(ask.MOST.values()))
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def send(server, body=None, path="/ask", **headers):
    """(status, headers, text) of a request; a dict is sent as JSON."""
    there = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    content = json.dumps(body) if isinstance(body, dict) else body
    kind = {} if body is None else {"Content-Type": "application/json"}
    there.request("GET" if body is None else "POST", path, content,
                  kind | {name.replace("_", "-"): value for name, value in headers.items()})
    answer = there.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def ask_page(server, body, **headers):
    """(status, what the page is told)."""
    status, _, text = send(server, body, **headers)
    return status, strict(text)


def wait(condition):
    """Wait until it is true, at most half a minute."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


# answers ------------------------------------------------------------------------------------------------------------

def test_the_page_gives_the_probabilities_and_words_of_the_judges_command(server, folder, capsys, monkeypatch):
    seen = []
    real = judging.describe_answer
    monkeypatch.setattr(judging, "describe_answer", lambda m, prob: (seen.append(prob), real(m, prob))[1])
    judging.main([str(folder / "a.png"), "--red", *map(str, RED), "--green", *map(str, GREEN), "--model", str(JUDGE),
                  "--all", "--both-orders"])
    printed = capsys.readouterr().out.splitlines()
    status, found = ask_page(server, QUESTION)
    assert status == 200 and [one["prob"] for one in found["answers"]] == seen
    assert [f"{one['modality']}: {one['judge']}" for one in found["answers"]] == printed


def test_a_judge_behind_a_server_is_asked_like_any_other_and_may_be_gone(folder, capsys, monkeypatch):
    question = json.dumps(QUESTION).encode()
    with served_stub.serve("vllm") as stub:
        judging.main([str(folder / "a.png"), "--red", *map(str, RED), "--green", *map(str, GREEN), "--model", stub.spec,
                      "--all", "--both-orders"])
        code, found = ask.Desk(load_judge(stub.spec), None, str(folder)).answer(ask.JSON, question)
    printed = capsys.readouterr().out.splitlines()
    assert code == 200 and [f"{one['modality']}: {one['judge']}" for one in found["answers"]] == printed
    monkeypatch.setattr("models.served.PAUSES", (0,))
    code, found = ask.Desk(load_judge("http://127.0.0.1:9#m"), None, str(folder)).answer(ask.JSON, question)
    assert code == 400 and "want a server" in found["error"]


def test_both_orders_are_the_judge_and_the_judge_asked_about_the_exchanged_pair(server):
    _, found = ask_page(server, QUESTION)
    _, other = ask_page(server, QUESTION | dict(red=GREEN, green=RED))
    for one, two, m in zip(found["answers"], other["answers"], NAMES, strict=True):
        p, q = two["prob"]
        assert one["prob"] == pytest.approx([q, p] if m == "albedo" else [1 - q, 1 - p], abs=1e-6)


def test_the_maps_are_read_at_the_photos_pixels(server, folder):
    maps = predict_photo(load_predictor(PREDICTOR), read_rgb(folder / "a.png"))
    pts = torch.tensor([[RED[::-1], GREEN[::-1]]])
    for one, m in zip(ask_page(server, QUESTION)[1]["answers"], NAMES, strict=True):
        wins = int(relation(maps[m], pts, m))
        first = sum(one["prob"]) >= 1
        assert one["relation"] == wins and f"(margin {float(margin(maps[m], pts, m)):+.3f})" in one["maps"]
        assert one["agree"] is (None if wins == 0 else (wins == 1) == first)


class Mute:
    """A judge of the user's that knows no answer."""

    size, grid = 16, 1

    def ask(self, rgb, pts, names=None, modalities=None):
        return torch.full((1, 1, len(NAMES)), torch.nan)


def test_an_answer_that_is_not_known_and_a_map_that_is_not_there_are_said(folder):
    rgb = read_rgb(folder / "a.png")
    code, found = ask.Desk(Mute(), None, str(folder)).answer(ask.JSON, json.dumps(QUESTION).encode())
    assert code == 200 and {one["judge"] for one in found["answers"]} == {"not known to this judge"}
    assert {(one["maps"], one["agree"], one["word"]) for one in found["answers"]} == {("no map", None, "not known")}
    flat = ask.answer_pair(Mute(), rgb, torch.tensor([RED, GREEN]), "a", dict(depth=torch.ones(1, 28, 40)))
    assert flat["answers"][0]["relation"] == 0 and "Too close" in flat["answers"][0]["maps"]


def test_a_dropped_photo_is_answered_as_the_same_photo_of_the_folder(server, folder):
    status, photo = ask_page(server, (folder / "a.png").read_bytes(), Content_Type="application/octet-stream")
    assert status == 200 and (photo["width"], photo["height"]) == (40, 28)
    dropped = QUESTION | dict(photo=photo["photo"])
    assert ask_page(server, dropped)[1]["answers"] == ask_page(server, QUESTION)[1]["answers"]
    status, found = ask_page(server, dropped)                                   # the other photo has taken its place
    assert status == 400 and "drop it again" in found["error"]


def test_one_photo_may_be_named_and_none(folder):
    assert ask.Desk(Mute(), None, str(folder / "link.png")).photos == ["secret.png"]     # the one that was asked for
    assert ask.Desk(Mute(), None, "").photos == []


# guards -------------------------------------------------------------------------------------------------------------

def test_the_page_lists_the_photos_of_the_folder_alone_and_no_name_ends_its_script(server):
    status, headers, page = send(server, path="/")
    about = strict(page.split("const about = ")[1].split(";\n")[0])
    assert status == 200 and about["photos"] == ["a.png", "sub/<b>.png"] and "<b>" not in page
    policy = headers["Content-Security-Policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2 and policy.startswith("default-src 'self';")
    assert headers["Cache-Control"] == "no-store"
    assert nonce not in send(server, path="/")[2]


@pytest.mark.parametrize("name", ["../secret.png", "link.png", "/etc/passwd", "sub/../a.png", "a.png\0", "", [], None])
def test_no_name_leaves_the_folder(server, name):
    for body in (dict(photo=name), QUESTION | dict(photo=name)):
        status, found = ask_page(server, body)
        assert status == 400 and "got no photo" in found["error"]
    assert send(server, path="/../secret.png")[0] == send(server, path="/secret.png")[0] == 404


def test_a_photo_that_becomes_a_link_to_the_outside_is_refused(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.png"
    photo.write_bytes((folder / "a.png").read_bytes())
    desk = ask.Desk(Mute(), None, str(photo.parent))
    photo.unlink()
    photo.symlink_to(folder / "a.png")
    code, found = desk.answer(ask.JSON, b'{"photo": "a.png"}')
    assert code == 400 and "want a path inside" in found["error"]


@pytest.mark.parametrize("headers, code", [
    (dict(Host="evil.example"), 403), (dict(Host="127.0.0.1"), 403), (dict(Origin="http://evil.example"), 403),
    (dict(Origin="null"), 403), (dict(Content_Type="text/plain"), 415), (dict(Content_Length="99999999"), 413),
    (dict(Content_Length="-1"), 413), (dict(Content_Length="many"), 413)])
def test_requests_of_other_pages_and_too_large_ones_are_refused(server, headers, code):
    status, found = ask_page(server, QUESTION, **headers)
    assert status == code and found["error"]
    if "Host" in headers:
        assert send(server, path="/", **headers)[0] == 404
        assert ask_page(server, QUESTION, Origin=f"http://127.0.0.1:{server.server_port}", **headers)[0] == code


@pytest.mark.parametrize("body, words", [
    ("{", "no JSON"), ("[1]", "other fields"), ("{}", "other fields"), ('{"photo": "a.png", "red": 1}', "other fields"),
    *[(json.dumps(QUESTION | dict(red=point)), "points of another form")
      for point in (None, "ab", [1], [1, 2, 3], {}, [[1], 2], [1e30, 0])],
    (json.dumps(QUESTION | dict(red=[40, 0])), "want 0 <= row < 28, 0 <= col < 40"),
    (json.dumps(QUESTION | dict(red=[-1, 0])), "want 0 <= row < 28"),
    (json.dumps(QUESTION | dict(red=GREEN)), "one point to the judge")])
def test_a_wrong_request_gets_one_line(server, body, words):
    status, found = ask_page(server, body)
    assert status == 400 and words in found["error"] and "\n" not in found["error"]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_dropped_file_that_is_no_picture_gets_one_line(server, content):
    status, found = ask_page(server, content, Content_Type="application/octet-stream")
    assert status == 400 and "cannot read" in found["error"]


def test_a_dropped_picture_of_too_many_pixels_gets_one_line(server, monkeypatch):
    monkeypatch.setitem(ask.decode_photo.__globals__["limit"], "pixels", 100)
    wide = io.BytesIO()
    Image.new("RGB", (20, 10)).save(wide, "PNG")
    status, found = ask_page(server, wide.getvalue(), Content_Type="application/octet-stream")
    assert status == 400 and "20 x 10 pixels" in found["error"]


def test_one_request_is_worked_on_and_those_beyond_the_queue_are_sent_away(server, monkeypatch):
    gate, inside, most = threading.Event(), [], []

    def answer(kind, content):
        inside.append(1)
        most.append(len(inside))
        gate.wait(30)
        inside.pop()
        return 200, {}

    monkeypatch.setattr(server.desk, "answer", answer)
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(ask_page(server, QUESTION)[0])) for _ in range(ask.QUEUE)]
    for thread in threads:
        thread.start()
    wait(lambda: server.desk.queue._value == 0)
    status, found = ask_page(server, QUESTION)
    gate.set()
    for thread in threads:
        thread.join()
    assert status == 503 and "waiting" in found["error"] and codes == [200] * ask.QUEUE and set(most) == {1}
    assert server.desk.queue._value == ask.QUEUE


def test_a_bug_is_shown_on_the_terminal_and_leaves_the_page_usable(server, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("a bug")
    with monkeypatch.context() as patch:
        patch.setattr(ask, "error_line", lambda error: "")
        patch.setattr(ask, "answer_pair", fail)
        status, found = ask_page(server, QUESTION)
    assert status == 500 and "terminal" in found["error"] and "RuntimeError: a bug" in capsys.readouterr().err
    assert ask_page(server, QUESTION)[0] == 200


# command ------------------------------------------------------------------------------------------------------------

def test_a_port_that_is_taken_or_none_is_one_line(server):
    for port in (server.server_port, 70000):
        with pytest.raises(ValueError, match=f"--port {port}: .*; want a free one, or 0") as error:
            ask.main(["--port", str(port)])
        assert "\n" not in str(error.value)


def test_no_weights_is_one_line(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ask.main(["--port", "0", "--model", str(tmp_path)])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_ctrl_c_ends_the_command_and_nothing_was_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    made, codes = [], []
    real = ask.open_server
    monkeypatch.setattr(ask, "open_server", lambda port: made.append(real(port)) or made[0])

    def use():
        wait(lambda: hasattr(made[0] if made else None, "about"))
        codes.append(ask_page(made[0], QUESTION)[0])
        codes.append(ask_page(made[0], (folder / "a.png").read_bytes(), Content_Type="application/octet-stream")[0])
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        ask.main([str(folder), "--model", str(JUDGE), "--predictor", str(PREDICTOR), "--port", "0"])
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert codes == [200, 200]
    assert capsys.readouterr().out == f"evaluation.ask: http://127.0.0.1:{made[0].server_port} (Ctrl-C ends it)\n"
    assert list(tmp_path.iterdir()) == []
    assert sorted(p.name for p in folder.rglob("*")) == ["<b>.png", "a.png", "link.png", "sub"]


# browser ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
        home = f"http://127.0.0.1:{server.server_port}/"
        assert opened.errors == [] and {address.removeprefix(home) for address in opened.requests} == {"", "ask"}


@pytest.fixture
def page(browser, server):
    """The page 400 px wide, its first photo open."""
    browser.open(f"http://127.0.0.1:{server.server_port}/", width=400)
    browser.until("!get('photo').hidden && get('picture').complete")
    return browser


def spot(page, x, y):
    """Where a pixel of the photo lies in the window."""
    left, top, width, height = page.run("(b => [b.x, b.y, b.width, b.height])(get('picture').getBoundingClientRect())")
    return left + (x + 0.5) * width / 40, top + (y + 0.5) * height / 28


def answers(page):
    """The judge's words on the page, when they have come."""
    page.until("!busy && document.querySelectorAll('article').length == 4")
    return page.run("[...document.querySelectorAll('article')].map(a => a.children[0].textContent + ': '"
                    " + a.children[2].textContent.replace('Judge: ', ''))")


def words(folder, red, green):
    """The same from Python."""
    judge = load_judge(JUDGE)
    square, pts = see_pair(judge, read_rgb(folder / "a.png"), torch.tensor([red, green]))
    prob = torch.stack([one.ask(square, pts)[0, 0] for one in BothOrders(judge).orders], 1).tolist()
    return [f"{m}: {judging.describe_answer(m, both)}" for m, both in zip(NAMES, prob, strict=True)]


@needs_browser
def test_two_clicks_and_keys_in_a_browser_ask_what_the_command_asks(page, folder, tmp_path):
    page.click(*spot(page, *RED))
    page.click(*spot(page, *GREEN))
    assert answers(page) == words(folder, RED, GREEN)
    assert page.run("[now.red, now.green, document.activeElement.id]") == [RED, GREEN, "green"]
    assert page.run("get('status').textContent").startswith("Judge: depth ")
    assert page.run("get('seen').complete && get('seen').naturalWidth") == 16
    page.press("ArrowLeft", 6)
    page.press("ArrowDown", 3)
    page.run("new Promise(done => setTimeout(done, 500))")                      # it asks 400 ms after the last key
    assert answers(page) == words(folder, RED, [24, 23])
    page.press("x")
    assert answers(page) == words(folder, [24, 23], RED)
    page.run("get('red').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.getAttribute('aria-valuetext')") == "3 from the left, 4 from the top"
    page.run("get('red').focus()")
    page.press("ArrowRight", 20)
    assert page.run("now.red") == [39, 23]                                      # the photo's edge
    page.run("place('red', 3, 27), place('green', 4, 27), run(ask)")
    page.until("!busy")
    assert "one point to the judge" in page.run("get('status').textContent")
    assert page.run("document.querySelectorAll('article').length") == 0         # no answer to another question stays
    page.upload("#file", folder / "sub" / "<b>.png")
    page.until("get('status').textContent.startsWith('<b>.png, 40 x 28')")


@needs_browser
def test_the_page_fits_400_px_and_everything_has_a_name(page):
    page.press("Enter")                                                         # the points have places from the start
    page.run("get('green').focus()")
    answers(page)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run("[...document.querySelectorAll('select, input')].every(e => e.labels.length == 1)")
    assert page.run("[...document.images].every(e => e.alt)") and page.run("document.documentElement.lang") == "en"
    assert page.run("['red', 'green'].every(id => get(id).tabIndex == 0 && get(id).getAttribute('aria-label'))")
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.run("get('status').getAttribute('role')") == "status"
