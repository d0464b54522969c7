"""A server of judges in a thread, with the answers' shapes of vLLM, llama.cpp, SGLang and transformers' chat."""
import base64
import contextlib
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from relations import MODALITIES

MODEL = "org/judge-4b"
IDS = {" red": 2518, " green": 6176, "Yes": 9454, "No": 2753}
OTHERS = {"The": 785, " Red": 3731, "red": 1151}  # what the likeliest tokens also are; the last is not " red"


def margin(picture, name):
    """What the stub thinks of an uint8 picture (H, W, 3): difference of the two words' log-probabilities."""
    return float(picture.astype(np.float64).mean() / 255 - 0.5) * (3 + list(MODALITIES).index(name))


def tokens_of(text):
    """Numbers of a text that ends with a deciding word, as a tokenizer gives them."""
    word = next(w for w in IDS if text.endswith(w))
    return [ord(c) for c in text.removesuffix(word)] + [IDS[word]]


class Stub(ThreadingHTTPServer):
    """kind  vllm, old vllm (knows no logprob_token_ids), llama.cpp, sglang, text

    bodies   of the questions, in the order in which they came
    before   called with the number of a question before it is answered; it may return (status, bytes) instead
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, kind, model=MODEL, before=lambda n: None, lacks=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind = kind
        self.model = model
        self.before = before
        self.lacks = lacks                                                      # words that are never listed
        self.bodies = []
        self.keys = set()
        self.lock = threading.Lock()
        self.spec = f"http://127.0.0.1:{self.server_address[1]}#{MODEL},size=32"

    def handle_error(self, request, client_address):
        """Say nothing of clients that leave."""


@contextlib.contextmanager
def serve(kind, **about):
    """Context with a Stub that answers."""
    stub = Stub(kind, **about)
    threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True                                              # as real servers: or 40 ms an answer

    def log_message(self, *_):
        """Nothing."""

    def reply(self, value, status=200):
        """Send JSON, or bytes as they are."""
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.server.keys.add(self.headers.get("Authorization"))
        if self.path == "/v1/models" and self.server.kind != "other":
            return self.reply(dict(object="list", data=[dict(id=MODEL, object="model")]))
        self.reply(dict(detail="Not Found"), 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = self.server.kind
        if self.path == "/tokenize" and "vllm" in kind:
            opening = body["messages"][-1]["content"]
            return self.reply(dict(tokens=tokens_of(opening), count=1, max_model_len=8192))
        if self.path == "/tokenize" and kind == "llama.cpp":
            return self.reply(dict(tokens=[]))
        if self.path == "/v1/systemone" and kind == "letters":
            return self.reply(dict(model=MODEL, answers={}))
        if self.path != "/v1/chat/completions" or kind == "models":
            return self.reply(dict(detail="Not Found"), 404)
        with self.server.lock:
            self.server.bodies.append(body)
            n = len(self.server.bodies)
        instead = self.server.before(n)
        if instead == "cut":                                                    # the server is killed
            self.close_connection = True
            return self.connection.close()
        self.reply(instead[1], instead[0]) if instead else self.reply(self.answer(body))

    def answer(self, body):
        """An answer to a question, in the shape of the server's kind."""
        content = next(m["content"] for m in body["messages"] if m["role"] == "user")
        url, text = content[0]["image_url"]["url"], content[1]["text"]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]))
        name = next(k for k, m in MODALITIES.items() if m.question == text)
        words = (" red", " green") if MODALITIES[name].prefix else ("Yes", "No")
        first = -math.log1p(math.exp(-margin(picture, name))) - 0.1
        second = first - margin(picture, name)
        listed = dict(zip(words, (first, second), strict=True))
        if self.server.kind != "vllm":
            listed |= dict.fromkeys(OTHERS, -5.0)
        listed = {k: v for k, v in listed.items() if k not in self.server.lacks}
        if self.server.kind == "vllm":                                          # the ids it was asked for
            assert body["logprob_token_ids"] == [IDS[w] for w in words]
            listed |= {w: -9999.0 for w in self.server.lacks if w in words}
        top = [self.token(*item, body) for item in sorted(listed.items(), key=lambda item: -item[1])]
        choice = dict(index=0, message=dict(role="assistant", content="red"), finish_reason="length",
                      logprobs=None if self.server.kind == "text" else dict(content=[dict(top[0], top_logprobs=top)]))
        if self.server.kind == "text":
            del choice["logprobs"]
        return dict(id="chatcmpl-1", object="chat.completion", created=0, model=self.server.model, choices=[choice],
                    usage=dict(prompt_tokens=330, completion_tokens=1, total_tokens=331))

    def token(self, word, value, body):
        """One entry of top_logprobs."""
        number = (IDS | OTHERS)[word]
        if "vllm" in self.server.kind:
            shown = f"token_id:{number}" if body.get("return_tokens_as_token_ids") else word
            return dict(token=shown, logprob=value, bytes=list(shown.encode()))
        if self.server.kind == "llama.cpp":
            return dict(id=number, token=word, bytes=list(word.encode()), logprob=value)
        return dict(token=word, bytes=list(word.encode()), logprob=value)


def slow(seconds, times=1000):
    """A `before` of Stub: its first so many questions take so long."""
    return lambda n: time.sleep(seconds) if n <= times else None
