"""A headless Chromium for tests of the X-ray page, driven over a pipe by its own protocol: no package is needed."""
import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]


class Browser:
    """One page of one browser. Whatever the page says on its console, or refuses to load, is kept in `messages`."""

    def __init__(self, folder):
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        # The browser reads commands from file 3 and writes to file 4.
        command = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "-", str(read_there), str(write_there), CHROMIUM, *FLAGS,
             f"--user-data-dir={folder}"],
            pass_fds=[read_there, write_there], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(read_there)
        os.close(write_there)
        self.reader, self.writer = open(read_here, "rb"), open(write_here, "wb", buffering=0)
        self.number, self.session, self.messages, self.waiting, self.rest = 0, None, [], [], b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.writer.close()
        self.process.terminate()
        self.process.wait(10)
        self.reader.close()

    def _receive(self):
        while b"\0" not in self.rest:
            piece = os.read(self.reader.fileno(), 1 << 20)
            if not piece:
                raise EOFError("the browser ended")
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(message)
        method, parameters = message.get("method"), message.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(parameters)[:2000])
        if method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "blob:", "about:")):
                self.messages.append(f"a request for {url}")
        return message

    def __call__(self, method, **parameters):
        """Send a command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.waiting.append(answer.get("method"))

    def open(self, url, width, dark, height=900):
        """Go to a page in a window of this width, and wait until it has been loaded."""
        self.appearance(width, dark, height)
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=url)
        for _ in range(200):
            if self.evaluate("document.readyState === 'complete' && location.href !== 'about:blank'"):
                return
            time.sleep(0.02)
        raise TimeoutError(url)

    def appearance(self, width, dark, height=900):
        """The size of the window, and whether the system is dark; nothing is to move by itself."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"}])

    def evaluate(self, expression):
        """The value of an expression of the page."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key, count=1, shift=False):
        """A key of the real keyboard, by its DOM name."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                 "ArrowDown": 40, "End": 35, "Home": 36}
        text = {"Enter": "\r", " ": " "}.get(key)
        for _ in range(count):
            for kind in ["keyDown", "keyUp"]:
                down = "keyDown" if text else "rawKeyDown"
                self("Input.dispatchKeyEvent", type=down if kind == "keyDown" else kind, key=key, code=key,
                     windowsVirtualKeyCode=codes[key], modifiers=8 if shift else 0,
                     **({"text": text} if text and kind == "keyDown" else {}))

    def click(self, selector, across=0.5, down=0.5):
        """A click of the mouse inside an element, at a fraction of its width and its height."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"(() => {{ const b = {place}.getBoundingClientRect();"
                            "return [b.left, b.top, b.width, b.height]; })()")
        x, y = box[0] + across * box[2], box[1] + down * box[3]
        for kind in ["mousePressed", "mouseReleased"]:
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path, whole=True):
        """A screenshot as a PNG file, of the whole page or of the window."""
        clip = {}
        if whole:
            size = self("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", **clip)["data"]))
