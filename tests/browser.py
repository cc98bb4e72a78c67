"""A headless Chromium that tests drive through its DevTools protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from websocket import WebSocket, create_connection

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--remote-debugging-port=0", "--remote-allow-origins=*", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--force-color-profile=srgb",
]  # fmt: skip


class Browser:
    """One page. Leaving the context manager ends the browser."""

    def __init__(self, width: int = 1280, height: int = 1000, dark: bool = False):
        self.size, self.dark = (width, height), dark
        self._folder = Path(tempfile.mkdtemp(prefix="browser-"))
        self._number = 0
        self.requested: list[str] = []  # the addresses that the page has asked for
        self._chosen: list[int] = []  # file inputs that were clicked

    def __enter__(self) -> Browser:
        assert PROGRAM is not None
        width, height = self.size
        flags = [*_FLAGS, f"--user-data-dir={self._folder}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            [PROGRAM, *flags, "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        port = None
        for line in self._process.stderr:
            if match := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
                port = match[1]
                break
        assert port, "the browser did not start"
        pages = requests.get(f"http://127.0.0.1:{port}/json", timeout=30).json()
        address = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
        self._socket: WebSocket = create_connection(address, timeout=60)
        for name in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{name}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(Exception):
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a DevTools method; raise AssertionError for its error."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            reply = json.loads(self._socket.recv())
            if reply.get("method") == "Network.requestWillBeSent":
                self.requested.append(reply["params"]["request"]["url"])
            if reply.get("method") == "Page.fileChooserOpened":
                self._chosen.append(reply["params"]["backendNodeId"])
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]

    def open(self, url: str) -> None:
        """Open a page."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript and return its value."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} is {value!r} after {seconds} s"
            time.sleep(0.2)
        return value

    def middle(self, expression: str) -> tuple[float, float]:
        """Scroll to an element and find its middle."""
        x, y = self.evaluate(
            f"(()=>{{const e={expression};e.scrollIntoView({{block:'center'}});"
            "const b=e.getBoundingClientRect();return [b.x+b.width/2,b.y+b.height/2]})()"
        )
        return x, y

    def click(self, expression: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        x, y = self.middle(expression)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def type(self, text: str) -> None:
        """Type into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key; `code` is its virtual key code."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code, **text)  # fmt: skip

    def choose_file(self, expression: str, path: Path) -> None:
        """Click a button that asks for a file, and choose one."""
        self.call("Page.setInterceptFileChooserDialog", enabled=True)
        self._chosen.clear()
        self.click(expression)
        deadline = time.monotonic() + 20
        while not self._chosen:
            assert time.monotonic() < deadline, f"{expression} asks for no file"
            self.evaluate("1")
            time.sleep(0.1)
        self.call("DOM.setFileInputFiles", files=[str(path)], backendNodeId=self._chosen[0])

    def scroll(self, expression: str, by: int) -> None:
        """Turn the wheel over the middle of an element."""
        x, y = self.middle(expression)
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)

    def screenshot(self, expression: str = "") -> bytes:  # PNG
        """Draw an element, or everything that is seen."""
        clip = None
        if expression:
            self.middle(expression)
            time.sleep(0.3)
            clip = self.evaluate(
                f"(()=>{{const b={expression}.getBoundingClientRect();"
                "return {x:b.x,y:b.y,width:b.width,height:b.height,scale:1}})()"
            )
        more = {"clip": clip} if clip else {}
        picture = self.call("Page.captureScreenshot", format="png", **more)
        return base64.b64decode(picture["data"])
