"""Broken requests, floods and clients that do not listen: an error, never a crash or a hang."""

import asyncio
import json
import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

from qemu.qmp import ExecuteError

from harness import TIMEOUT, Case, Raw
from vocabulary import prepare_arguments


class BadInput(Case):
    """Whatever a client sends, it gets an error and the daemon lives."""

    async def test_unknown_command(self):
        client = await self.client()
        with self.assertRaises(ExecuteError) as error:
            await client.execute("fly")
        self.assertEqual(error.exception.error_class, "CommandNotFound")
        self.assertEqual((await client.execute("query-status"))["host"], "a")

    async def test_wrong_requests(self):
        raw = await self.raw()
        run = str(uuid.uuid4())
        wrong = [
            "text", 1, [], None, True, {}, {"execute": 1}, {"execute": None}, {"exec-oob": []},
            {"execute": "query-status", "exec-oob": "abort"},
            {"execute": "query-status", "extra": 1},
            {"execute": "query-status", "arguments": []},
            {"execute": "query-status", "arguments": None},
            {"execute": "query-status", "arguments": {"extra": 1}},
            {"execute": "query-run"},
            {"execute": "query-run", "arguments": {"run": 1}},
            {"execute": "query-run", "arguments": {"run": "no uuid"}},
            {"execute": "query-run", "arguments": {"run": run, "extra": 1}},
            {"execute": "arm", "arguments": {"run": run}},
            {"execute": "arm", "arguments": {"run": run, "epoch": -1}},
            {"execute": "arm", "arguments": {"run": run, "epoch": 1.5}},
            {"execute": "arm", "arguments": {"run": run, "epoch": "1"}},
            {"execute": "arm", "arguments": {"run": run, "epoch": 2**64}},
            {"execute": "arm", "arguments": {"run": run, "epoch": 1}},
            {"execute": "throttle", "arguments": {"run": run, "epoch": 1, "vm": "web", "percent": 300}},
            {"execute": "decide", "arguments": {"run": run, "value": "perhaps"}},
            {"execute": "decide", "arguments": {"run": run, "value": "source"}},
            {"execute": "decide", "arguments": {"run": run, "vm": run, "value": "commit"}},
            {"execute": "start", "arguments": {"run": run, "epoch": 1, "vms": ["web"]}},
            {"execute": "recover", "arguments": {"run": run, "value": "abort", "fenced": "b"}},
        ]
        for number, request in enumerate(wrong):
            with self.subTest(request=request):
                if isinstance(request, dict):
                    request = {**request, "id": number}
                answer = await raw.ask(request)
                self.assert_error(answer)
                if isinstance(request, dict):
                    self.assertEqual(answer["id"], number)
        await self.assert_serves(raw)

    async def test_broken_lines(self):
        raw = await self.raw()
        deep = b'{"execute":' + b"[" * 5000 + b"]" * 5000 + b"}"
        for line in (b"{", b'{"execute": "query-status"', b"\x00\xff\xfe\x80", b"\xc3\x28", b"NaN", deep,
                     b'{"execute": "query-status", "id": NaN}', b"'", b'{"execute": "\\ud800"}'):
            with self.subTest(line=line[:30]):
                self.assert_error(await raw.ask(line + b"\n"), text="invalid JSON")
        await raw.send(b"\n\r\n   \n\t\n")
        await self.assert_serves(raw)
        self.assertIn("return", await raw.ask(b'{"execute": "query-status"}\r\n'))

    async def test_newlines_may_be_left_out(self):
        raw = await self.raw()
        for number in range(3):
            answer = await raw.ask(b'{"execute": "query-status", "id": %d}' % number)
            self.assertEqual(answer["id"], number)
        await raw.send(b'{"execute": "query-status", "id": "}\\"{"}{"execute": "fly", "id": [{}]}{"a": 1}')
        self.assertEqual((await raw.answer())["id"], '}"{')
        self.assertEqual((await raw.answer())["id"], [{}])
        self.assert_error(await raw.answer())
        await raw.send(b'{"execute": ')
        await self.assert_serves()
        self.assertIn("return", await raw.ask(b'"query-status"}'))

    async def test_a_line_that_is_too_long(self):
        raw = await self.raw()
        line = json.dumps({"execute": "query-status", "id": "x" * (300 << 10)}).encode() + b"\n"
        self.assert_error(await raw.ask(line), text="262144 bytes")
        await self.assert_serves(raw)
        fits = json.dumps({"execute": "query-status", "id": "x" * (200 << 10)}).encode() + b"\n"
        self.assertEqual(len((await raw.ask(fits))["id"]), 200 << 10)

    async def test_binary_garbage(self):
        raw = await self.raw(negotiate=False)
        noise = bytes(byte for byte in os.urandom(1 << 16) if byte not in (0x0A, 0x0D, 0x20, 0x09)) + b"\n"
        self.assert_error(await raw.ask(noise))
        await raw.send({"execute": "query-status", "id": "after the noise"})
        answer = await raw.answer()
        while answer.get("id") != "after the noise":
            self.assert_error(answer)
            answer = await raw.answer()
        await raw.send(os.urandom(2 << 20))
        raw.close()
        await self.assert_serves()

    async def test_half_a_line_then_gone(self):
        for _ in range(20):
            raw = await self.raw()
            await raw.send(b'{"execute": "query-')
            raw.close()
        await self.assert_serves()

    async def test_prepare_with_nonsense(self):
        raw = await self.raw()
        bad = {
            "no token": {"token": ""}, "short token": {"token": "ab" * 31}, "token not hex": {"token": "zz" * 32},
            "unknown role": {"role": "spectator"}, "no VMs": {"vms": []}, "VMs of another type": {"vms": {}},
            "too many VMs": {"vms": [{"vm": f"v{n}", "uuid": str(uuid.uuid4()), "token": "ab" * 32} for n in range(257)]},
            "lease 0": {"lease_ms": 0}, "lease a day": {"lease_ms": 86_400_000}, "lease negative": {"lease_ms": -1},
            "interval 0": {"report_interval_ms": 0}, "downtime 0": {"max_downtime_ms": 0}, "downtime huge": {"max_downtime_ms": 2**63},
            "channels": {"multifd_channels": 256}, "hold a number": {"hold": 1}, "uuid": {"uuid": "web"},
            "name empty": {"vm": ""}, "name a path": {"vm": "../web"}, "name long": {"vm": "x" * 65},
            "register nowhere": {"register": "http://x"}, "register relative": {"register": "unix:x"},
            "register no port": {"register": "tcp:127.0.0.1"}, "register a name": {"register": "tcp:localhost:1"},
            "no template": {"role": "destination"}, "run": {"run": "1"}, "epoch": {"epoch": None}, "unknown key": {"speed": 1},
        }
        for key, value in {
            "stall_epsilon": (1.0, -0.1, 1e308, "NaN", None), "max_memory_factor": (0.5, -1, "Infinity"),
            "stall_rounds": (0, -1, 1.5), "max_rounds": (0, 2**32), "unknown": (1,),
        }.items():
            for number in value:
                bad[f"{key} {number}"] = {"termination": {key: number}}
        for name, changes in bad.items():
            with self.subTest(name):
                request = {"execute": "prepare", "arguments": prepare_arguments(self.a, **changes), "id": name}
                answer = await raw.ask(request)
                self.assert_error(answer)
                self.assertEqual(answer["id"], name)
        for text in (b"NaN", b"Infinity", b"1e999"):
            line = json.dumps({"execute": "prepare", "arguments": prepare_arguments(self.a, termination="@")}).encode()
            self.assert_error(await raw.ask(line.replace(b'"@"', b'{"stall_epsilon": %s}' % text) + b"\n"))
        self.assertEqual((await raw.ask({"execute": "query-status"}))["return"]["runs"], [], "a refused run stayed")


class Crowds(Case):
    """Many clients, fast clients, and clients that do not listen."""

    async def test_thousands_of_commands_without_reading(self):
        raw = await self.raw()
        count = 5000
        lines = b"".join(json.dumps({"execute": "query-settings", "id": n}).encode() + b"\n" for n in range(count))
        await asyncio.wait_for(raw.send(lines), TIMEOUT)
        await self.assert_serves()
        for number in range(count):
            self.assertEqual((await raw.read())["id"], number)

    async def test_a_flood_that_is_never_read(self):
        raw = await self.raw()
        raw.writer.transport.pause_reading()
        line = b'{"execute": "query-muster-schema"}\n' * 1000

        async def flood():
            while True:
                raw.writer.write(line)
                await raw.writer.drain()

        task = asyncio.create_task(flood())
        other = await self.raw()
        for _ in range(20):
            begun = time.monotonic()
            await self.assert_serves(other)
            self.assertLess(time.monotonic() - begun, 1.0, "one client keeps the daemon from the others")
        with suppress(OSError):
            await asyncio.wait_for(task, TIMEOUT)
        self.assertTrue(task.done() and not task.cancelled(), "the flood was not cut off")
        memory = Path(f"/proc/{self.a.process.pid}/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", memory)[1])
        self.assertLess(peak, 64 << 10, "kB that one client made the daemon use")
        await self.assert_serves()

    async def test_a_client_that_never_reads_events(self):
        deaf = await self.raw()
        teller = await self.client()
        arguments = prepare_arguments(self.a, report_interval_ms=20)
        await teller.execute("prepare", **arguments)
        await teller.wait_for("RUN_ENDED", run=arguments["run"])
        await self.assert_serves()
        self.assertEqual((await deaf.read())["event"], "FAILED")

    async def test_seventy_connections(self):
        crowd = []
        for _ in range(70):
            reader, writer = await asyncio.open_unix_connection(str(self.a.socket))
            self.addCleanup(writer.close)
            crowd.append(Raw(reader, writer))
        greetings = [await raw.reader.readline() for raw in crowd]
        self.assertEqual(sum(1 for line in greetings if line), 64)
        self.assertFalse(any(greetings[64:]), "the last ones are the refused ones")
        crowd[0].close()
        await crowd[0].writer.wait_closed()
        # Its place is free once its end was seen: a round trip on another connection follows it.
        await crowd[1].ask({"execute": "qmp_capabilities"})
        await self.assert_serves()
