"""What the tests of the control protocol stand on: sidecars, QEMUs, raw and QMP clients.

Nothing here waits for a fixed time: processes are ready when they say so, events are awaited by
name with a deadline.
"""

import asyncio
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
import unittest
import uuid
from contextlib import suppress
from pathlib import Path

from qemu.qmp import QMPClient

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 10.0
LONGEST_LINE = 64 << 20


def sidecar_binary():
    """The program under test; without it nothing can be tested."""
    named = os.environ.get("MUSTER_SIDECAR")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    tried = [Path(named)] if named else [target / kind / "muster-sidecar" for kind in ("release", "debug")]
    for path in tried:
        if path.is_file():
            return str(path)
    names = " or ".join(str(path) for path in tried)
    raise SystemExit(f"muster-sidecar is missing (looked for {names}): cargo build --release -p muster-sidecar")


def qemu_binary():
    """QEMU for the flows; a missing one is a failure too."""
    found = shutil.which("qemu-system-x86_64")
    if not found:
        raise SystemExit("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
    return found


SIDECAR = sidecar_binary()
QEMU = qemu_binary()


class Sidecar:
    """A muster-sidecar process with directories of its own."""

    def __init__(self, directory, host="a", extra="", vms="", control="", listen="127.0.0.1:0"):
        self.host = host
        self.directory = Path(directory)
        self.state = self.directory / "state"
        self.runtime = self.directory / "run"
        self.socket = self.runtime / "control.sock"
        self.config = self.directory / "sidecar.toml"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'version = 1\nhost = "{host}"\nstate-dir = "{self.state}"\n'
            f'runtime-dir = "{self.runtime}"\n{extra}\n'
            f'[control]\nunix = "{self.socket}"\n{control}\n'
            f'[stream]\nlisten = "{listen}"\n{vms}'
        )
        self.process = None
        self.log = []

    @property
    def address(self):
        """As `register` names it."""
        return f"unix:{self.socket}"

    async def start(self):
        """Starts it; it is ready when it has said where it listens."""
        self.process = await asyncio.create_subprocess_exec(
            SIDECAR, "--config", str(self.config), stderr=asyncio.subprocess.PIPE
        )
        while True:
            line = await asyncio.wait_for(self.process.stderr.readline(), TIMEOUT)
            if not line:
                raise AssertionError(f"the sidecar did not start: {''.join(self.log)}")
            self.log.append(line.decode())
            if "control at" in self.log[-1]:
                break
        self._reader = asyncio.create_task(self._read_log())
        return self

    async def _read_log(self):
        while line := await self.process.stderr.readline():
            self.log.append(line.decode())

    def is_alive(self):
        """Whether it still runs."""
        return self.process.returncode is None

    async def kill(self):
        """As a power cut would end it."""
        self.process.kill()
        await self.process.wait()
        await self._reader

    async def stop(self):
        """As systemd would end it."""
        if self.process is None or not self.is_alive():
            return
        self.process.terminate()
        await asyncio.wait_for(self.process.wait(), TIMEOUT)
        await self._reader

    def run_to_end(self, *options):
        """Runs the program with this configuration where it is expected to end by itself."""
        return subprocess.run(
            [SIDECAR, "--config", str(self.config), *options],
            capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )


class Raw:
    """A client that may be as rude as it likes."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path, negotiate=True):
        """Connects, and negotiates unless told otherwise."""
        raw = cls(*await asyncio.open_unix_connection(str(path), limit=LONGEST_LINE))
        raw.greeting = await raw.read()
        if negotiate:
            await raw.send({"execute": "qmp_capabilities"})
            assert await raw.read() == {"return": {}}
        return raw

    async def send(self, message):
        """Sends bytes as they are, anything else as a line of JSON."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        self.writer.write(data)
        await self.writer.drain()

    async def read(self):
        """The next message; None at the end."""
        line = await asyncio.wait_for(self.reader.readline(), TIMEOUT)
        return json.loads(line) if line else None

    async def answer(self):
        """The next message that is no event."""
        while True:
            message = await self.read()
            if message is None or "event" not in message:
                return message

    async def ask(self, message):
        """Sends and returns the answer."""
        await self.send(message)
        return await self.answer()

    def close(self):
        """Hangs up."""
        self.writer.close()


class Client:
    """qemu.qmp's client with a memory for events."""

    def __init__(self, qmp):
        self.qmp = qmp
        self.events = []
        self._news = asyncio.Event()
        self._collector = None

    @classmethod
    async def connect(cls, address, name="test"):
        """Connects to a path or a (host, port) and negotiates as qemu.qmp does."""
        qmp = QMPClient(name)
        await asyncio.wait_for(qmp.connect(address if isinstance(address, tuple) else str(address)), TIMEOUT)
        client = cls(qmp)
        client._collector = asyncio.create_task(client._collect())
        return client

    async def _collect(self):
        async for event in self.qmp.events:
            self.events.append(event)
            self._news.set()

    async def execute(self, command, **arguments):
        """A command whose argument names have underscores on the wire too."""
        return await asyncio.wait_for(self.qmp.execute(command, arguments or None), TIMEOUT)

    async def wait_for(self, name, after=0, timeout=TIMEOUT, **data):
        """The first event of this name whose data has these members."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events[after:]:
                if event["event"] == name and all(event["data"].get(key) == value for key, value in data.items()):
                    return event
            self._news.clear()
            left = deadline - time.monotonic()
            seen = [event["event"] for event in self.events if event["event"] != "STATUS"]
            bad = [event["data"] for event in self.events if event["event"] in ("FAILED", "IN_DOUBT")]
            if left <= 0:
                raise AssertionError(f"no {name} {data} within {timeout} s; seen: {seen} {bad}")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)

    async def close(self):
        """Hangs up, once."""
        if self._collector:
            self._collector.cancel()
            self._collector = None
            await self.qmp.disconnect()


class Case(unittest.IsolatedAsyncioTestCase):
    """A test with a directory and a running sidecar `a`."""

    sidecar_options = {}

    async def asyncSetUp(self):
        # Socket paths are short.
        self.directory = Path(tempfile.mkdtemp(prefix="mst-", dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        await self.open()

    async def open(self):
        """What the test needs; one sidecar unless it says otherwise."""
        self.a = await self.sidecar(**self.sidecar_options)

    async def sidecar(self, name="a", **options):
        """Starts a sidecar that ends with the test."""
        sidecar = await Sidecar(self.directory / name, host=name, **options).start()
        self.addAsyncCleanup(sidecar.stop)
        return sidecar

    async def client(self, address=None):
        """A QMP client that ends with the test."""
        client = await Client.connect(address or self.a.socket)
        self.addAsyncCleanup(client.close)
        return client

    async def raw(self, negotiate=True, path=None):
        """A raw client that ends with the test."""
        raw = await Raw.connect(path or self.a.socket, negotiate)
        self.addCleanup(raw.close)
        return raw

    async def assert_serves(self, raw=None):
        """The daemon lives, and the connection (or a new one) is usable."""
        self.assertTrue(self.a.is_alive(), "".join(self.a.log))
        raw = raw or await self.raw()
        answer = await raw.ask({"execute": "query-status", "id": "alive"})
        self.assertEqual(answer["id"], "alive")
        self.assertEqual(answer["return"]["host"], "a")

    def assert_error(self, answer, error_class="GenericError", text=""):
        """The answer is an error of this class, in one line, that says this."""
        self.assertIn("error", answer or {}, answer)
        self.assertEqual(answer["error"]["class"], error_class, answer)
        self.assertIn(text, answer["error"]["desc"])
        self.assertNotIn("\n", answer["error"]["desc"])


class Guest:
    """A tiny QEMU under TCG that moves."""

    ARGUMENTS = [
        "-nodefaults", "-no-user-config", "-display", "none",
        "-machine", "pc,accel=tcg", "-m", "32",
    ]

    def __init__(self, directory, name):
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.token = os.urandom(32).hex()
        self.monitor = Path(directory) / f"{name}.src"
        self.direct = Path(directory) / f"{name}.see"
        self.log = Path(directory) / f"{name}.log"
        # Memory that does not shrink to nothing on the wire, as zero pages do.
        self.contents = Path(directory) / f"{name}.ram"
        self.contents.write_bytes(os.urandom(8 << 20))
        self.process = None

    def arguments(self):
        """What both ends have in common."""
        contents = f"loader,file={self.contents},addr=0x1000000,force-raw=on"
        return [QEMU, *self.ARGUMENTS, "-device", contents, "-name", self.name, "-uuid", self.uuid]

    def template(self):
        """A `[[vm]]` that can receive it."""
        incoming = [*self.arguments(), "-qmp", "unix:{qmp},server=on,wait=off", "-incoming", "defer", "-S"]
        return f'[[vm]]\nname = "{self.name}"\nincoming = {json.dumps(incoming)}\n'

    def source_entry(self):
        """A `[[vm]]` for where it runs."""
        return f'[[vm]]\nname = "{self.name}"\nqmp = "{self.monitor}"\n'

    async def start(self):
        """Boots it with two monitors: one for the sidecar, one to look at it."""
        monitors = []
        for path in (self.monitor, self.direct):
            monitors += ["-qmp", f"unix:{path},server=on,wait=off"]
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.arguments(), *monitors, stdout=log, stderr=log
            )
        deadline = time.monotonic() + TIMEOUT
        while not self.direct.exists():
            if self.process.returncode is not None or time.monotonic() > deadline:
                raise AssertionError(f"QEMU did not start: {self.log.read_text()}")
            await asyncio.sleep(0.01)
        return self

    async def look(self, path=None):
        """What one sees at its monitor: run state, capabilities, parameters."""
        client = await Client.connect(path or self.direct)
        try:
            capabilities = await client.execute("query-migrate-capabilities")
            return {
                "status": (await client.execute("query-status"))["status"],
                "capabilities": {item["capability"]: item["state"] for item in capabilities},
                "parameters": await client.execute("query-migrate-parameters"),
                "uuid": (await client.execute("query-uuid"))["UUID"],
            }
        finally:
            await client.close()

    async def stop(self):
        """Ends the source's process where it still is."""
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


def mode_of(path):
    """Permission bits."""
    return stat.S_IMODE(os.stat(path).st_mode)
