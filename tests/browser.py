"""Chromium for tests, driven through its own DevTools protocol with the standard library alone.

    with Browser(tmp_path) as page:
        page.open(path.as_uri(), width=400)
        page.click("#red")                        # centre of an element, or page.click(x, y)
        page.press("ArrowRight")
        assert page.run("document.title") == "..."     # value of a JavaScript expression; promises are awaited
        page.save_picture(tmp_path / "page.png")
        assert page.requests == [...]             # every address it asked for, data: left out

A test file that uses it starts with `pytestmark = needs_browser`.
"""
import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
FLAGS = ("--headless=new", "--remote-debugging-port=0", "--no-sandbox", "--no-first-run", "--disable-gpu",
         "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--proxy-server=direct://")
KEYS = dict(ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, Home=36, End=35, Tab=9, Enter=13, Escape=27)
SECONDS = 60                      # that the browser may take for one answer


class Socket:
    """Client side of a WebSocket (RFC 6455) that carries text messages, enough for one local peer."""

    def __init__(self, url):
        at = urllib.parse.urlsplit(url)
        self.peer = socket.create_connection((at.hostname, at.port), timeout=SECONDS)
        self.file = self.peer.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (f"GET {at.path} HTTP/1.1", f"Host: {at.netloc}", "Upgrade: websocket", "Connection: Upgrade",
                 f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "")
        self.peer.sendall("\r\n".join(lines).encode())
        status = self.file.readline()
        assert b" 101 " in status, status
        while self.file.readline().strip():
            pass

    def send(self, text):
        """Send one text message, masked with zeros: the peer is our own child."""
        body = text.encode()
        n = len(body)
        size = bytes([0x80 | n]) if n < 126 else b"\xfe" + struct.pack(">H", n) if n < 1 << 16 else (
            b"\xff" + struct.pack(">Q", n))
        self.peer.sendall(b"\x81" + size + bytes(4) + body)

    def receive(self):
        """The next text message, of one frame or many."""
        body = b""
        while True:
            first, size = self._read(2)
            size = struct.unpack(">H", self._read(2))[0] if size == 126 else (
                struct.unpack(">Q", self._read(8))[0] if size == 127 else size)
            part = self._read(size)
            if first & 0x0F in (0, 1):                                          # continuation, text
                body += part
                if first & 0x80:
                    return body.decode()
            assert first & 0x0F != 8, "the browser closed the connection"

    def _read(self, n):
        data = self.file.read(n)
        assert len(data) == n, "the browser went away"
        return data


class Browser:
    """One headless page. A context manager; `requests` and `errors` fill while the page lives."""

    def __init__(self, folder):
        self.folder = folder                                                    # of its profile, which it writes to
        self.requests = []                                                      # addresses, data: and blob: left out
        self.errors = []                                                        # uncaught errors and console.error

    def __enter__(self):
        env = os.environ | dict(HOME=str(self.folder))
        profile = self.folder / "chromium"
        self.child = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        try:
            self._connect(profile)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self, profile):
        port = self._wait(lambda: (profile / "DevToolsActivePort").read_text().split("\n")[0])
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        pages = self._wait(lambda: [one for one in json.load(opener.open(f"http://127.0.0.1:{port}/json/list"))
                                    if one["type"] == "page"])
        self.socket = Socket(pages[0]["webSocketDebuggerUrl"])
        self.calls = 0
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __exit__(self, *error):
        self.child.terminate()
        self.child.wait(10)

    def _wait(self, ask):
        """The first answer that is true; None of a file or port counts as an answer."""
        for _ in range(SECONDS * 20):
            try:
                if answer := ask():
                    return answer
            except OSError:
                assert self.child.poll() is None, "chromium ended at once"
            time.sleep(0.05)
        raise TimeoutError("chromium opened no DevTools port")

    def call(self, method, **params):
        """Call a method of the protocol: its result. Events that come before it are kept."""
        self.calls += 1
        self.socket.send(json.dumps(dict(id=self.calls, method=method, params=params)))
        while (message := json.loads(self.socket.receive())).get("id") != self.calls:
            self._keep(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def _keep(self, event):
        kind, params = event.get("method"), event.get("params")
        if kind == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "blob:")):
            self.requests.append(params["request"]["url"])
        if kind == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "error"))
        if kind == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str([a.get("value") for a in params["args"]]))

    def open(self, url, width=1200, height=900):
        """Load a page into a window of so many pixels; returns when it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        self.until("document.readyState == 'complete'")

    def run(self, script):
        """Value of a JavaScript expression; a promise is awaited. An error in it fails the test."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script):
        """Wait until an expression is true; returns its value."""
        for _ in range(SECONDS * 20):
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}")

    def place(self, selector):
        """Centre of the first element that a CSS selector names, after scrolling to it: x, y in px of the window."""
        return self.run(f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
                        "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })"
                        f"(document.querySelector({json.dumps(selector)}))")

    def move(self, x, y, kind="mouseMoved", **more):
        """Move the mouse to x, y px of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y=None):
        """Click at x, y px of the window, or at the centre of the element that a CSS selector names."""
        x, y = self.place(x) if y is None else (x, y)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.move(x, y, kind, button="left", clickCount=1)

    def press(self, key, times=1):
        """Press a key: a name of KEYS, or one character."""
        code = KEYS.get(key) or ord(key.upper())
        text = {} if key in KEYS else dict(text=key)
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def set_scheme(self, scheme):
        """Show the page as people who prefer "light" or "dark" see it."""
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])

    def upload(self, selector, *paths):
        """Choose files in an <input type=file>."""
        node = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=node, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(p) for p in paths])

    def save_picture(self, path):
        """PNG of the whole page, also of what lies below the window."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
