"""A page on this machine that asks the judge: two clicks on a photo, its answers, and what a predictor's maps say.

requests  GET /: the page, ask.html. POST /ask, answered in JSON: the bytes of a picture, or JSON {photo} takes it to
          hand, {photo, red, green} asks; points are x, y in pixels of the photo, as those of judge.py
guards    it listens on 127.0.0.1 and answers its own page alone (Host, Origin). A photo is one that was found at the
          start and lies in its folder. One request is worked on, the others wait. Nothing is written
"""
import contextlib
import hashlib
import json
import math
import secrets
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from data.orders import BothOrders
from data.photos import decode_photo, find_images, read_rgb, resize_long
from data.pictures import png_address
from judge import describe_answer, load_judge, see_pair
from predictor import load_predictor, predict_photo
from relations import MODALITIES, NAMES, check_points, draw_markers, margin, relation
from runtime.command import error_line, run_command
from runtime.files import DamageGuard, decode_json, finite_json, path_inside
from runtime.flags import Parser
from runtime.ranks import pick_device
from runtime.weights import RULES

JSON = "application/json"
MOST = {JSON: 1 << 16, "application/octet-stream": 1 << 25}      # bytes of a request; the second is a picture
QUEUE = 5                         # requests at a time: one is worked on, the others wait
PATIENCE = 20                     # s that a request may take to arrive, and its answer when the command ends
SHOWN = 1024                      # px, longer side of the photo on the page at most
POLICY = ("default-src 'self'; img-src 'self' data:; script-src 'nonce-{0}'; style-src 'nonce-{0}'; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")


def read_maps(maps, pts, modality):
    """What a photo's maps (C, H, W) say of a pair (1, 2, 2) in their pixels: relation (0 without a map), and words."""
    if modality not in maps:
        return 0, "no map"
    wins = int(relation(maps[modality], pts, modality))
    words = MODALITIES[modality].answers[wins < 0] if wins else "Too close to tell, or no value there."
    return wins, f"{words} (margin {float(margin(maps[modality], pts, modality)):+.3f})"


@torch.no_grad()
def answer_pair(judge, rgb, xy, name, maps, device="cpu"):
    """All that the page shows about two points of a photo.

    rgb      (3, H, W) in [0, 1];  xy (2, 2) x, y of it, red first;  name  of the photo, for the judge
    maps     dict modality -> (C, H, W) of a predictor; {} without one
    returns  dict: seen, a picture; answers, a dict for each modality, of which prob is [p, q] of data/orders.py and
             agree is None where there is nothing to compare
    raises   ValueError: the points are one to the judge
    """
    square, pts = see_pair(judge, rgb, xy, device)
    prob = torch.stack([one.ask(square, pts, [name], NAMES)[0, 0] for one in BothOrders(judge).orders], 1)   # (M, 2)
    answers = []
    for m, (p, q) in zip(NAMES, prob.tolist(), strict=True):
        known = math.isfinite(p + q)
        first = p + q >= 1
        wins, words = read_maps(maps, xy.flip(-1)[None], m)
        answers.append(dict(modality=m, question=MODALITIES[m].question, prob=[p, q], judge=describe_answer(m, [p, q]),
                            word=MODALITIES[m].words[not first] if known else "not known", maps=words, relation=wins,
                            agree=(wins > 0) == first if wins and known else None))
    return dict(seen=png_address(draw_markers(square, pts)[0, 0].cpu().numpy()), answers=answers)


class Desk:
    """What the page works with: a judge, a predictor or None, the photos of a folder ("": none).

    now          name, pixels and maps of the photo at hand, the only one that is kept
    lock, queue  whoever answers holds both; the queue has room for QUEUE
    """

    def __init__(self, judge, policy, images, device="cpu"):
        self.judge = judge
        self.policy = policy
        self.device = device
        self.lock = threading.Lock()
        self.queue = threading.Semaphore(QUEUE)
        place = Path(images).resolve()
        self.root = place if place.is_dir() else place.parent
        found = find_images(place) if images else []
        self.photos = [str(p.relative_to(self.root)) for p in found if p.resolve().is_relative_to(self.root)]
        self.now = (), None, {}                                                 # JSON has no such name

    def take(self, photo, content=None):
        """Take a photo to hand, of the folder or from bytes; returns it for the page. raises ValueError, OSError."""
        if content is None and photo not in self.photos:
            raise ValueError(f"got no photo {str(photo)[:80]!r}; want one of the list, or drop it again")
        if content is None:
            rgb = read_rgb(path_inside(self.root, photo, "ask"))
        else:
            rgb = decode_photo(content, "dropped file")
        self.now = photo, rgb, {}
        H, W = rgb.shape[1:]
        shown = resize_long(rgb, min(SHOWN, max(H, W)))
        return dict(photo=photo, width=W, height=H, picture=png_address(shown.numpy()))

    def ask(self, photo, red, green):
        """Answer about two points of a photo; see answer_pair. The first question about a photo makes its maps."""
        if photo != self.now[0]:
            self.take(photo)
        _, rgb, maps = self.now
        with DamageGuard("ask: a request", "points of another form", "[x, y] of each", "reload the page"):
            xy = torch.tensor([red, green], dtype=torch.int64).view(2, 2)
        check_points("ask", xy.flip(-1), rgb.shape[1:])
        if self.policy is not None and not maps:
            maps |= predict_photo(self.policy, rgb)
        return answer_pair(self.judge, rgb, xy, str(self.root / photo), maps, self.device)

    def answer(self, kind, content):
        """Answer a request: (HTTP code, dict). An error with a remedy is a line; a bug is shown on the terminal."""
        try:
            if kind != JSON:
                return 200, self.take(f"dropped {hashlib.sha256(content).hexdigest()[:16]}", content)
            found = decode_json(content, "ask: a request", ("no JSON", "an object", "reload the page"))
            if not isinstance(found, dict) or set(found) not in ({"photo"}, {"photo", "red", "green"}):
                raise ValueError("ask: a request: got other fields than photo, red, green; reload the page")
            return 200, (self.ask if "red" in found else self.take)(**found)
        except (OSError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
            line = error_line(error)
            if not line:
                traceback.print_exc()
            return 400 if line else 500, dict(error=line or "a bug: the terminal shows it")


class Handler(BaseHTTPRequestHandler):
    """Answers one request; see the module docstring. Its server has a desk, and about: what the page says of it."""

    timeout = PATIENCE

    def do_GET(self):
        """The page."""
        if self.path != "/" or not self._is_local(self.headers.get("Host")):
            return self.send(404, JSON, "{}")
        nonce = secrets.token_urlsafe()
        page = Path(__file__).with_name("ask.html").read_text("utf-8").replace("NONCE", nonce)
        about = json.dumps(self.server.about).replace("<", "\\u003c")           # a name cannot end the script
        self.send(200, "text/html; charset=utf-8", page.replace("ABOUT", about), nonce)

    def do_POST(self):
        """A photo or a question, after those that wait."""
        desk = self.server.desk
        code, found = self._problem()
        if not code and not desk.queue.acquire(blocking=False):
            code, found = 503, dict(error=f"{QUEUE} requests are waiting; ask again in a moment")
        elif not code:
            try:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                with desk.lock:
                    code, found = desk.answer(self.headers["Content-Type"], content)
            finally:
                desk.queue.release()
        self.send(code, JSON, json.dumps(finite_json(found), allow_nan=False))

    def _is_local(self, host):
        return host in [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]

    def _problem(self):
        """Why a POST is not worked on: (HTTP code, dict), code 0 where it is."""
        host = self.headers.get("Host")
        origin = self.headers.get("Origin", f"http://{host}")
        kind = self.headers.get("Content-Type")
        size = self.headers.get("Content-Length", "")
        if self.path != "/ask" or not (self._is_local(host) and self._is_local(origin.removeprefix("http://"))):
            return 403, dict(error="another page or host")
        if kind not in MOST:
            return 415, dict(error=f"got {kind}; want {' or '.join(MOST)}")
        if not (size.isdecimal() and len(size) < 16 and int(size) <= MOST[kind]):
            return 413, dict(error=f"got {size} bytes; want at most {MOST[kind]}")
        return 0, {}

    def send(self, code, kind, text, nonce=""):
        """Send a text, which no other page may use and no cache keeps, to whoever still waits for it."""
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                            "Content-Security-Policy": POLICY.format(nonce), "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin"}.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_):
        """Print nothing: the page shows what happens."""


def arguments(argv):
    """Parse and check the command line."""
    p = Parser(prog="evaluation.ask", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("images", nargs="?", default="", metavar="PHOTO_OR_DIR", help="photos to choose from [drop one]")
    p.add_argument("--model", default="out/mini/judge", metavar="SPEC", help=f"judge: {RULES} [out/mini/judge]")
    p.add_argument("--predictor", default="", metavar="SPEC", help="whose maps are compared with the judge [none]")
    p.add_argument("--port", type=int, default=8765, help="of the page; 0: any that is free [8765]")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    p.limits()
    return p.parse_args(argv)


def open_server(port):
    """An HTTP server on 127.0.0.1; 0: any free port. raises ValueError: it is taken, or may not be used."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: got {error}; want a free one, or 0 for any") from None


def main(argv=None):
    """Command line: serve the page until Ctrl-C."""
    args = arguments(argv)
    device = pick_device(args.device, "evaluation.ask")
    with open_server(args.port) as server:
        judge = load_judge(args.model, device)
        policy = load_predictor(args.predictor).to(device) if args.predictor else None
        server.desk = Desk(judge, policy, args.images, device)
        server.about = dict(judge=args.model, predictor=args.predictor, size=judge.size, photos=server.desk.photos,
                            most=max(MOST.values()))
        print(f"evaluation.ask: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        server.desk.lock.acquire(timeout=PATIENCE)                              # the answer under way is finished


if __name__ == "__main__":
    run_command(main, "evaluation.ask")
