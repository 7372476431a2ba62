"""A page in headless Chromium, over the DevTools protocol on two pipes: no driver, no network, no port."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 120
"""The longest that a start, a load or an answer may take: machines that run the tests may be busy."""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `problems` are its console errors, exceptions and failed or foreign requests."""

    def __init__(self, program: str, *, width: int = 1280, dark: bool = False):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._width, self._dark = width, dark
        self._program = program
        self._number = 0
        self._waiting = b""
        self._loaded = False

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]

        # The protocol's pipes are descriptors 3 and 4 of the browser.
        launch = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", launch, "bash", str(to_read), str(to_write), self._program, *options],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        os.set_blocking(self._read, False)
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": self._width, "height": 900, "deviceScaleFactor": 1, "mobile": self._width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._write)
        self._process.terminate()
        self._process.wait(timeout=SECONDS)
        os.close(self._read)
        self._profile.cleanup()

    def open(self, path: Path) -> None:
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda: self._loaded)

    def evaluate(self, expression: str):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        import base64

        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, fromSurface=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: dict[int, dict] = {}
        self._until(lambda: self._number in answers, answers)
        answer = answers[self._number]
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _until(self, done, answers: dict | None = None) -> None:
        ends = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < ends, "the browser does not answer"
            assert self._process.poll() is None, f"the browser ended with {self._process.returncode}"
            try:
                self._waiting += os.read(self._read, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            *messages, self._waiting = self._waiting.split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    if answers is not None:
                        answers[message["id"]] = message
                else:
                    self._event(message["method"], message["params"])

    def _event(self, method: str, params: dict) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.loadingFailed":
            self.problems.append(str(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
