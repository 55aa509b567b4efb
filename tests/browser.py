"""A page in headless Chromium, over its debugging pipe: no package, no port.

python tests/browser.py PAGE.html OUT.png [--width=1280] [--dark] [--section=timeline]
"""

import argparse
import base64
import json
import os
import pathlib
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
FLAGS += ["--no-first-run", "--hide-scrollbars"]


class Browser:
    """One tab. `said` collects what its console shows: errors, warnings, exceptions, requests."""

    def __init__(self, profile: pathlib.Path):
        ours, theirs = os.pipe(), os.pipe()  # (read, write): to the browser, and back

        def descriptors():  # Chromium reads commands on 3 and writes on 4
            low, high = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(low, 3), os.dup2(high, 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        how = {"preexec_fn": descriptors, "close_fds": False, **quiet}
        how["env"] = {**os.environ, "HOME": str(profile)}
        command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, **how)
        os.close(ours[0]), os.close(theirs[1])
        self.write, self.read = ours[1], os.fdopen(theirs[0], "rb")
        self.number, self.said, self.session, self.loaded = 0, [], None, False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        how = {"targetId": target, "flatten": True}
        self.session = self.call("Target.attachToTarget", **how)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """A command's result; RuntimeError if the browser refuses it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def receive(self) -> dict:
        text = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.said.append(params)
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.said.append(params)
        self.loaded |= method == "Page.loadEventFired"
        return message

    def open(self, page: pathlib.Path, width=1280, height=900, dark=False, phone=False):
        """Load a page and wait until it says that it is drawn."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.loaded = False
        self.call("Page.navigate", url=f"file://{pathlib.Path(page).resolve()}")
        while not self.loaded:
            self.receive()
        end = time.monotonic() + 20
        while not self.run("document.documentElement.dataset.drawn"):
            assert time.monotonic() < end, f"not drawn: {self.said}"
            time.sleep(0.02)

    def run(self, expression: str):
        """The value of a JavaScript expression in the page."""
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def picture(self, path: pathlib.Path, section: str = ""):
        """A PNG of the whole page, or of the element with that id."""
        box = f"document.getElementById('{section}')" if section else "document.documentElement"
        names = ["x", "y", "width", "height"]
        sides = "(b) => [b.x + scrollX, b.y + scrollY, b.width, b.height]"
        values = self.run(f"({sides})({box}.getBoundingClientRect())")
        clip = {**dict(zip(names, values)), "scale": 1}
        how = {"captureBeyondViewport": True, "clip": clip}
        data = self.call("Page.captureScreenshot", **how)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def close(self):
        os.close(self.write)  # the end of its commands ends the browser
        self.process.terminate()
        self.process.wait()
        self.read.close()


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--section", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(pathlib.Path(folder))
        browser.open(args.page, args.width, dark=args.dark, phone=args.width < 600)
        browser.picture(args.out, args.section)
        print(f"drawn after {browser.run('document.documentElement.dataset.drawn')} ms")
        for params in browser.said:
            print(json.dumps(params)[:500])
        browser.close()
