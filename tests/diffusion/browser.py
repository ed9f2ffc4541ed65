"""A headless Chromium, spoken to over two pipes: pages loaded, looked at, and used by keyboard."""

import json
import os
import shutil
import subprocess

import pytest

_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
]
_KEYS = {"Tab": ("Tab", 9, ""), " ": ("Space", 32, " "), "ArrowLeft": ("ArrowLeft", 37, ""), "Home": ("Home", 36, "")}


def needed():
    """Return the program, or skip where it is not installed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return found


class Browser:
    """One page of a browser of its own.

    ``errors`` are what its scripts logged or threw, ``requests`` the addresses that it asked for.
    """

    def __init__(self, profile):
        (from_us, to_it), (from_it, to_us) = os.pipe(), os.pipe()
        program = needed()
        command = " ".join([program, *_FLAGS, f"--user-data-dir={profile}", f"3<&{from_us}", f"4>&{to_us}"])
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self.writing, self.reading = os.fdopen(to_it, "wb", buffering=0), os.fdopen(from_it, "rb")
        self.number, self.session, self.events, self.buffer = 0, None, [], b""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.reading.fileno(), 1 << 20)
            assert part, "the browser ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.writing.write(json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url, *, width=1200, height=900, dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def run(self, script):
        """Return the value of an expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key):
        name, code, text = _KEYS[key]
        for kind in ("keyDown", "keyUp"):
            typed = text if kind == "keyDown" else ""
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=name, windowsVirtualKeyCode=code, text=typed)

    @property
    def errors(self):
        self.run("0")  # so that what happened before has been told
        methods = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [event["params"] for event in self.events if event["method"] in methods]

    @property
    def requests(self):
        self.run("0")
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def close(self):
        self.writing.close()
        self.process.terminate()
        self.process.wait(30)
        self.reading.close()
