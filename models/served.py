"""Judges behind a server: --judge http://HOST:PORT#MODEL, for a model that another program holds in memory.

MODEL is the id under which the server lists it (GET /v1/models); every answer must come from it. Two wires, tried in
this order with one question about a grey picture:

systemone   POST /v1/systemone of `transformers serve`: all questions of a pair in one request, answered by the
            probabilities of the two deciding words. Its prompt is a file on the server (docs/judges.md)
chat        POST /v1/chat/completions of vLLM, SGLang and llama.cpp: one question a request. The assistant's turn is
            opened with the words that both answers share; the log-probabilities of the next token are read

    p = sigmoid(log p["red"] - log p["green"])        albedo: "Yes" against "No"

A word that is missing in an answer makes it NaN, never 0: a server that lists the likeliest tokens may leave it out.
"""
import base64
import http.client
import io
import json
import math
import os
import re
import threading
import time
import zlib
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

import torch
from PIL import Image

from models.families import FAMILIES
from relations import MODALITIES, NAMES, check_points, draw_markers
from runtime.files import DamageGuard, decode_json, one_line, refuse

ADDRESS = re.compile(r"(https?://[^/?#@\s]+)((?:/[^?#@\s]*)?)#([^,\s]+)((?:,(?:size|family)=\w+)*)")
WANT = "http://HOST:PORT#MODEL, MODEL as the server's GET /v1/models names it; ,size=PX or ,family=NAME may follow"
SIZE = 512                        # px, side of the pictures it is sent, unless the address says size=
SIZES = (32, 4096)                # px
REQUESTS = 40                     # under way at once: the pairs of a photo
PATIENCE = 120                    # s that an answer may take
PAUSES = (0, 0.5, 1, 2, 4, 8, 16)  # s before each repetition of a request that failed
BUSY = (408, 425, 429, 500, 502, 503, 504)      # HTTP: may pass
MISSING = (404, 405, 501)         # HTTP: no such endpoint
LIKELIEST = 20                    # tokens whose log-probability a chat server is asked for: vLLM's largest number
FLOOR = -9999                     # vLLM's stand-in for minus infinity
NO_JSON = ("an answer that is not JSON", "JSON", "check what listens there")
KEY = "REASONX_JUDGE_KEY"         # environment variable: the key that the server wants, if it wants one


class ServedJudge:
    """A judge.AnyJudge whose answers come from a server, which is asked for the first time by `ask`.

    spec    http://HOST:PORT#MODEL, with ,size=PX and ,family=NAME: the system text of that row of families.FAMILIES
    raises  ValueError: not of that form
    """

    grid = 1

    def __init__(self, spec):
        found = ADDRESS.fullmatch(str(spec))
        if not found:
            raise ValueError(f"judge: got {str(spec)!r}; want {WANT}")
        base, path, self.model, rest = found.groups()
        options = dict(part.split("=") for part in rest.split(",")[1:])
        size = options.get("size", str(SIZE))
        if not size.isdigit() or not SIZES[0] <= int(size) <= SIZES[1]:
            raise ValueError(f"judge: got size={size}; want {SIZES[0]} to {SIZES[1]} px")
        family = options.get("family", "")
        if family and family not in FAMILIES:
            raise ValueError(f"judge: got family={family}; want one of {', '.join(FAMILIES)}, or none")
        self.size = int(size)
        self.system = FAMILIES[family].system if family else ""
        self.server = Server(base, path.rstrip("/").removesuffix("/v1"))
        self.wire = None

    def digest(self):
        """What the bank keys answers by: model, prompt and size, not the address. Weights cannot be read from here."""
        sentences = [(m.question, m.answers) for m in MODALITIES.values()]
        return (f"served judge {self.model}, {self.size} px, asked {json.dumps([self.system, sentences])}; its weights "
                "are behind a server and cannot be hashed: when they change, remove the bank")

    @torch.no_grad()
    def ask(self, rgb, pts, names=None, modalities=None):
        """As judge.Judge.ask; NaN also where an answer lacks a deciding word.

        raises  ValueError: one line, when the server is gone or answers something else
        """
        B, P = pts.shape[:2]
        if tuple(rgb.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f"judge.ask: got photos {tuple(rgb.shape)}; want (B, 3, {self.size}, {self.size})")
        check_points("judge.ask", pts, rgb.shape[-2:])
        asked = tuple(m for m in NAMES if modalities is None or m in modalities)
        prob = torch.full((B * P, len(NAMES)), torch.nan)
        if not prob.numel() or not asked:
            return prob.view(B, P, len(NAMES)).to(rgb.device)
        self.wire = self.wire or find_wire(self, asked)
        index = [NAMES.index(m) for m in asked]
        with ThreadPool(min(REQUESTS, B * P)) as pool:                          # none of its threads delays an exit
            for part in torch.arange(B * P).split(REQUESTS):                    # so many pictures in memory
                pictures = (mark_picture(rgb[n // P], pts[n // P, n % P]) for n in part)
                sent = pool.imap(lambda picture: self._send(self.wire, picture, asked), pictures)
                for n, answers in zip(part, sent, strict=True):
                    prob[n, index] = torch.tensor(self._read(self.wire, answers, asked))
        return prob.view(B, P, len(NAMES)).to(rgb.device)

    def probe(self, wire, asked):
        """Ask a wire about two points of a grey picture. raises Refused; ValueError: it is no judge of that."""
        S = self.size
        picture = mark_picture(torch.full((3, S, S), 0.5), torch.tensor([[S // 3, S // 3], [S // 2, S // 2]]))
        prob = self._read(wire, self._send(wire, picture, asked, patient=False), asked)
        lacking = [name for name, p in zip(asked, prob, strict=True) if math.isnan(p)]
        if lacking:
            refuse(f"judge: {self.server.url}",
                   f"no deciding word of {', '.join(lacking)} among the {LIKELIEST} likeliest tokens",
                   "a model that answers in the official sentences, and a server that continues a turn that was begun",
                   "docs/judges.md names servers")

    def _send(self, wire, picture, asked, patient=True):
        """Answers (bytes) to the requests about one marked picture (3, S, S) uint8."""
        png = encode_png(picture)
        return [self.server.post(wire.path, body, patient) for body in wire.bodies(png, asked)]

    def _read(self, wire, answers, asked):
        """Probabilities, a list over `asked`, in the answers of `_send`. Not in threads: the guard sets warnings."""
        where = f"judge: {self.server.url}{wire.path}"
        found = [decode_json(answer, where, NO_JSON) for answer in answers]
        with DamageGuard(where, f"an answer of another form: {answers[0][:80]}", "that of a server of docs/judges.md",
                         "check what listens there"):
            for answer in found:
                if answer["model"] != self.model:
                    refuse(where, f"an answer of the model {answer['model']!r}", repr(self.model),
                           "the server was started with another one")
            return wire.read(found, asked)


def mark_picture(photo, points):
    """A photo (3, S, S) in [0, 1] with the markers of two points (2, 2): uint8 on the CPU."""
    marked = draw_markers(photo[None], points[None, None])[0, 0]
    return (marked * 255).round().to(torch.uint8).cpu()


def encode_png(picture):
    """A picture (3, H, W) uint8 as a PNG file in base64; run lengths pack a photo fastest, and as small as any."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return base64.b64encode(buffer.getvalue()).decode()


class Refused(ValueError):
    """An answer with an error of HTTP that does not pass by waiting.  status  its number;  text  what it says."""

    def __init__(self, where, status, text):
        super().__init__(f"judge: {where}: got HTTP {status} ({one_line(text)}), want an answer; see its own log")
        self.status = status
        self.text = text


class Server:
    """HTTP with a server; every thread has its own connection.  base  http://HOST:PORT;  path  before /v1."""

    def __init__(self, base, path):
        self.url = base + path
        self.parts = urlsplit(base)
        self.path = path
        self.own = threading.local()

    def post(self, path, body, patient=True):
        """Send a JSON object (None: GET) and return the answer as bytes; patient: after repetitions if need be.

        raises  Refused; ValueError: no answer
        """
        pauses = PAUSES if patient else ()
        body = None if body is None else json.dumps(body).encode()
        for pause in (*pauses, None):
            try:
                status, answer = self._exchange(path, body)
                if status == 200:
                    return answer
                why = f"HTTP {status}: {one_line(answer.decode(errors='replace'))}"
                if status not in BUSY:
                    raise Refused(self.url + path, status, answer.decode(errors="replace"))
            except (OSError, http.client.HTTPException) as error:               # refused, too slow, cut off
                self.own.connection = None
                why = one_line(error)
            if pause is not None:
                time.sleep(pause)
        raise ValueError(f"judge: {self.url}: got no answer to {len(pauses) + 1} requests ({why}), want a server; "
                         "start it and run the same command again: what the bank holds is not asked again")

    def _exchange(self, path, body):
        connection = getattr(self.own, "connection", None)
        if connection is None:
            secure = self.parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            connection = self.own.connection = kind(self.parts.netloc, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        connection.request("GET" if body is None else "POST", self.path + path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def find_wire(judge, asked):
    """Ask a server which wire it offers: SystemOne or Chat. raises ValueError: neither; it has no such model.

    asked   modalities in which it must know the deciding words
    """
    server = judge.server
    where = f"judge: {server.url}/v1/models"
    try:
        listed = decode_json(server.post("/v1/models", None, patient=False), where, NO_JSON)
    except Refused as error:
        if error.status in MISSING:
            raise ValueError(f"{error}: it serves no models; want {WANT}") from None
        raise
    with DamageGuard(where, "an answer of another form", "a list of models", "check what listens there"):
        models = [row["id"] for row in listed["data"]]
    if judge.model not in models:
        raise ValueError(f"{where}: got no {judge.model!r}, want one of {', '.join(map(repr, models))} after the #")
    for wire in (SystemOne(judge), Chat(judge)):
        try:
            wire.prepare()
            judge.probe(wire, asked)
        except Refused as error:
            if error.status not in MISSING:
                raise
        else:
            return wire
    raise ValueError(f"judge: {server.url}: got neither POST {SystemOne.path} nor POST {Chat.path}, want one of them; "
                     "docs/judges.md names servers")


class SystemOne:
    """The wire of `transformers serve`, whose prompt lies in a file on the server (--decision-config)."""

    path = "/v1/systemone"

    def __init__(self, judge):
        self.judge = judge

    def prepare(self):
        """See whether the server has the two words of our file as its labels: then it refuses a third option.

        raises  Refused: no such endpoint; ValueError: it has other labels, the letters of its own prompt
        """
        three = dict(type="choice", criteria={"red": None, "green": None, "blue": None})
        try:
            body = dict(model=self.judge.model, state="", questions=dict(three=three))
            self.judge.server.post(self.path, body, patient=False)
        except Refused as error:
            if "at most 2 options" in error.text:
                return
            raise
        refuse(f"judge: {self.judge.server.url}", "a server that answers by letters", "the prompt of the judge",
               "start it with --decision-config FILE, the file of docs/judges.md")

    def bodies(self, png, asked):
        """The requests about a picture, a list: one with all questions."""
        questions = {}
        for name in asked:
            m = MODALITIES[name]
            options = ("true", "false") if m.yes_no else m.words
            questions[name] = dict(type="noul" if m.yes_no else "choice", instructions=m.question,
                                   criteria=dict(zip(options, m.answers, strict=True)))
        picture = {"img-1": dict(type="image", format="png", data_base64=png)}
        return [dict(model=self.judge.model, state="img-1", questions=questions, assets=picture)]

    def read(self, found, asked):
        """Probabilities in the decoded answers, a list over `asked`."""
        answers = [found[0]["answers"][name] for name in asked]
        prob = [float(answer["noul"] if MODALITIES[name].yes_no else answer["probabilities"][MODALITIES[name].words[0]])
                for name, answer in zip(asked, answers, strict=True)]
        if not all(0 <= p <= 1 for p in prob):
            raise ValueError(f"probabilities {prob}")
        return prob


class Chat:
    """The wire of OpenAI's chat completions, with the log-probabilities of the next token."""

    path = "/v1/chat/completions"

    def __init__(self, judge):
        self.judge = judge
        self.ids = {}                                                           # modality -> tokens of its two words

    def prepare(self):
        """Learn the numbers of the deciding words' tokens from a server that tells them (vLLM: POST /tokenize).

        raises  ValueError: they are not one token each
        """
        for name, m in MODALITIES.items():
            try:
                first, second = (self._tokens(m, word) for word in spell_words(m))
            except ValueError:                                                  # no such endpoint, or of another form
                return
            if not first:                                                       # llama.cpp's, which is of another form
                return
            if first[:-1] != second[:-1] or first[-1] == second[-1]:
                raise ValueError(f"judge: {self.judge.model} has no single token for each of {m.words} ({name}); want "
                                 "a model that keeps them whole")
            self.ids[name] = [first[-1], second[-1]]

    def _tokens(self, m, word):
        """A question and its answer up to a deciding word as the server's tokens."""
        where = f"judge: {self.judge.server.url}/tokenize"
        body = dict(model=self.judge.model) | self._turns(m.question, m.prefix + word)
        answer = decode_json(self.judge.server.post("/tokenize", body, patient=False), where, NO_JSON)
        with DamageGuard(where, "an answer of another form", "tokens", "check what listens there"):
            return list(answer["tokens"])

    def _turns(self, content, opening):
        """Fields of a request: the turns of system and user, and the assistant's that is to be continued."""
        turns = [dict(role="system", content=self.judge.system)] if self.judge.system else []
        turns.append(dict(role="user", content=content))
        if opening:
            turns.append(dict(role="assistant", content=opening))
        return dict(messages=turns, add_generation_prompt=not opening, continue_final_message=bool(opening),
                    chat_template_kwargs=dict(enable_thinking=False))

    def bodies(self, png, asked):
        """The requests about a picture, a list: one a question. The picture comes first, so a server may keep it."""
        picture = dict(type="image_url", image_url=dict(url=f"data:image/png;base64,{png}"))
        fields = dict(model=self.judge.model, temperature=0, max_tokens=1, max_completion_tokens=1, logprobs=True,
                      top_logprobs=LIKELIEST)
        made = []
        for name in asked:
            m = MODALITIES[name]
            ids = dict(logprob_token_ids=self.ids[name], return_tokens_as_token_ids=True) if name in self.ids else {}
            made.append(fields | ids | self._turns([picture, dict(type="text", text=m.question)], m.prefix))
        return made

    def read(self, found, asked):
        """Probabilities in the decoded answers, a list over `asked`; NaN: a deciding word is missing."""
        return [self._probability(answer, name) for name, answer in zip(asked, found, strict=True)]

    def _probability(self, answer, name):
        told = (answer["choices"][0].get("logprobs") or {}).get("content")
        if not told:
            refuse(f"judge: {self.judge.server.url}", "text alone", "log-probabilities of its tokens (top_logprobs)",
                   "docs/judges.md names servers that give them")
        words = zip(spell_words(MODALITIES[name]), self.ids.get(name, (None, None)), strict=True)
        first, second = (find_logprob(told[0]["top_logprobs"], word, number) for word, number in words)
        return 1 / (1 + math.exp(min(second - first, 700)))                     # 700: exp has no more


def spell_words(m):
    """The deciding words of a row of the modality table as they follow its prefix: with the blank."""
    return [f" {word}" if m.prefix else word for word in m.words]


def find_logprob(listed, word, number):
    """Log-probability of a word in a list of tokens: found by its number, else by its bytes; NaN: not there."""
    for token in listed:
        spelt = token.get("bytes") or token["token"].encode()
        same = number is not None and (token.get("id") == number or token["token"] == f"token_id:{number}")
        if same or bytes(spelt) == word.encode():
            value = token["logprob"]
            return math.nan if value is None or value <= FLOOR else value
    return math.nan
