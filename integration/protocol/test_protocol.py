"""The control protocol as its clients see it: qemu.qmp and ruder ones against real sidecars.

Run through scripts/protocol-test.sh, which installs qemu.qmp. The last two cases move a guest
between two sidecars with two real QEMU processes under TCG.
"""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
import unittest
import uuid
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from qemu.qmp import ExecuteError  # noqa: E402

from harness import ROOT, TIMEOUT, Case, Guest, Raw, Sidecar, mode_of  # noqa: E402

COMMANDS = {
    "qmp_capabilities", "query-muster-schema", "query-status", "query-host", "query-vms",
    "query-vm", "query-settings", "query-run", "query-decision", "prepare", "start", "pace", "hold",
    "arm", "disarm", "release", "continue", "decide", "commit", "abort", "finish", "throttle", "yank",
    "keep-alive", "set-report-interval", "recover", "forget",
}
EVENTS = {
    "PREPARED", "ROUND", "HELD", "ARMED", "STOPPED", "SWITCHING", "ARRIVED", "COMMITTED",
    "ROLLED_BACK", "DIVERGED", "FAILED", "COORDINATOR_LOST", "IN_DOUBT", "DECIDED", "THROTTLED",
    "STATUS", "RUN_ENDED",
}
VM_REPORT = {
    "vm", "uuid", "role", "phase", "round", "total_bytes", "transferred_bytes", "remaining_bytes",
    "dirty_rate_bytes_per_s", "rate_bytes_per_s", "limit_bytes_per_s", "throttle_percent", "history",
    "remaining_at_release_bytes", "stopped_at_us", "resumed_at_us", "rounds", "error",
}


def prepare_arguments(sidecar, **changes):
    """A `prepare` that would be accepted."""
    vm = {"vm": "web", "uuid": str(uuid.uuid4()), "token": "ab" * 32}
    arguments = {
        "run": str(uuid.uuid4()), "epoch": 1, "role": "source", "register": sidecar.address, "vms": [vm],
    }
    for key, value in changes.items():
        if key in vm:
            vm[key] = value
        else:
            arguments[key] = value
    return arguments


class Talking(Case):
    """Greeting, negotiation, answers, and queries."""

    sidecar_options = {"vms": '[[vm]]\nname = "web"\nadopt = true\n[[vm]]\nname = "db"\nqmp = "/nonexistent.qmp"\n'}

    async def test_qemu_qmp_greets_and_negotiates(self):
        client = await self.client()
        version = client.qmp.greeting.QMP.version
        self.assertEqual(version["muster"], {"major": 1, "minor": 0})
        self.assertEqual(version["host"], "a")
        self.assertRegex(version["package"], r"^\d+\.\d+\.\d+$")
        self.assertIn("oob", client.qmp.greeting.QMP.capabilities)
        with self.assertRaises(ExecuteError) as again:
            await client.execute("qmp_capabilities")
        self.assertEqual(again.exception.error_class, "CommandNotFound")

    async def test_before_negotiation_only_negotiation(self):
        raw = await self.raw(negotiate=False)
        for command in ("query-status", "query-muster-schema"):
            self.assert_error(await raw.ask({"execute": command}), "CommandNotFound", "qmp_capabilities")
        unknown = {"execute": "qmp_capabilities", "arguments": {"enable": ["teleport"]}}
        self.assert_error(await raw.ask(unknown), text="teleport")
        self.assertEqual(await raw.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}), {"return": {}})
        await self.assert_serves(raw)

    async def test_queries(self):
        client = await self.client()
        status = await client.execute("query-status")
        self.assertEqual(set(status), {"host", "version", "uptime_ms", "runs", "alarms"})
        self.assertEqual(([run for run in status["runs"] if not run["ended"]], status["alarms"]), ([], []))
        host = await client.execute("query-host")
        self.assertEqual(
            set(host),
            {"host", "available_memory_bytes", "state_free_bytes", "stream_address", "sidecar_version", "qemu_version"},
        )
        self.assertGreater(host["available_memory_bytes"], 1 << 20)
        self.assertGreater(host["state_free_bytes"], 0)
        self.assertRegex(host["stream_address"], r"^127\.0\.0\.1:\d+$")
        vms = {vm["vm"]: vm for vm in await client.execute("query-vms")}
        self.assertEqual(set(vms), {"web", "db"})
        self.assertEqual(set(vms["web"]), {"vm", "qmp", "qmp_present", "can_receive"})
        self.assertEqual([vms["web"]["can_receive"], vms["db"]["can_receive"]], [True, False])
        self.assertEqual(vms["db"]["qmp"], "/nonexistent.qmp")
        self.assertFalse(vms["db"]["qmp_present"])
        settings = await client.execute("query-settings")
        self.assertEqual(settings, {"link_bytes_per_s": None, "runs": []})
        run = str(uuid.uuid4())
        self.assertEqual(await client.execute("query-decision", run=run), {})
        for command, arguments in (("query-run", {"run": run}), ("query-vm", {"vm": "db"})):
            with self.assertRaises(ExecuteError) as error:
                await client.execute(command, **arguments)
            self.assertEqual(error.exception.error_class, "GenericError")

    async def test_query_vm_stays_in_its_directories(self):
        raw = await self.raw()
        for name in ("../web", "/etc/passwd", "a/b", "", "x\u0000y"):
            answer = await raw.ask({"execute": "query-vm", "arguments": {"vm": name}})
            self.assert_error(answer, text="no name for a VM")

    async def test_schema_lists_what_is_accepted(self):
        client, raw = await self.client(), await self.raw()
        schema = await client.execute("query-muster-schema")
        self.assertEqual(set(schema), {"protocol", "commands", "events"})
        self.assertEqual(schema["protocol"], {"major": 1, "minor": 0})
        commands = {command["name"]: command for command in schema["commands"]}
        self.assertEqual(len(commands), len(schema["commands"]), "a command is listed twice")
        self.assertEqual(set(commands), COMMANDS)
        self.assertEqual({name for name, c in commands.items() if c["oob"]}, {"abort", "yank"})
        for name, command in commands.items():
            self.assertEqual(set(command), {"name", "oob", "arguments"})
            self.check_schema(command["arguments"])
            self.assertIs(command["arguments"].get("additionalProperties"), False, name)
            answer = await raw.ask({"execute": name, "arguments": {"no such argument": 1}})
            self.assert_error(answer, text="no such argument")
        self.check_schema(schema["events"])
        self.assertEqual(set(re.findall(r'"const": "([A-Z_]+)"', json.dumps(schema["events"]))), EVENTS)

    def check_schema(self, schema):
        """The shape of a JSON schema: types that exist, references that lead somewhere."""
        types = {"object", "array", "string", "integer", "number", "boolean", "null"}
        definitions = schema.get("$defs", {})

        def walk(node):
            if isinstance(node, bool):
                return
            self.assertIsInstance(node, dict)
            declared = node.get("type", [])
            declared = [declared] if isinstance(declared, str) else declared
            self.assertLessEqual(set(declared), types)
            if "$ref" in node:
                self.assertIn(node["$ref"].removeprefix("#/$defs/"), definitions)
            self.assertLessEqual(set(node.get("required", [])), set(node.get("properties", {})))
            for children in (node.get("properties", {}), node.get("$defs", {})):
                for child in children.values():
                    walk(child)
            for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
                for child in node.get(key, []):
                    walk(child)
            for key in ("items", "additionalProperties"):
                if key in node:
                    walk(node[key])

        self.assertIn("$schema", schema)
        walk(schema)

    async def test_documentation_names_everything(self):
        text = (ROOT / "docs" / "protocol.md").read_text()
        for name in COMMANDS:
            self.assertIn(f"`{name}`", text, "docs/protocol.md does not describe this command")
        for name in EVENTS:
            self.assertIn(f"`{name}`", text, "docs/protocol.md does not describe this event")
        for field in VM_REPORT:
            self.assertIn(f"`{field}`", text, "docs/protocol.md does not describe this field")

    async def test_ids_of_every_type_come_back(self):
        raw = await self.raw()
        for tag in (0, -1, 1.5, "text", "", True, None, [1, {"a": []}], {"deep": {"er": [None]}}, 2**63, "\u00fc\u0000"):
            answer = await raw.ask({"execute": "query-status", "id": tag})
            self.assertEqual(answer["id"], tag)
            self.assertIn("return", answer)
            answer = await raw.ask({"execute": "fly", "id": tag})
            self.assertEqual(answer["id"], tag)
            self.assert_error(answer, "CommandNotFound")
            # An answer that comes from the storage thread carries it too.
            run = {"run": str(uuid.uuid4())}
            self.assertEqual((await raw.ask({"execute": "query-decision", "arguments": run, "id": tag}))["id"], tag)
        self.assertNotIn("id", await raw.ask({"execute": "query-status"}))

    async def test_out_of_band(self):
        raw = await self.raw()
        run = {"run": str(uuid.uuid4()), "epoch": 1}
        self.assert_error(await raw.ask({"exec-oob": "abort", "arguments": run}), text="not known here")
        self.assert_error(await raw.ask({"exec-oob": "yank", "arguments": {**run, "vm": "web"}}), text="not known here")
        for name, arguments in (("query-status", {}), ("arm", run), ("keep-alive", run)):
            self.assert_error(await raw.ask({"exec-oob": name, "arguments": arguments}), text="out-of-band")
        self.assert_error(await raw.ask({"exec-oob": "fly"}), "CommandNotFound")
        await self.assert_serves(raw)


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


class Records(Case):
    """The register: written once, kept over a crash."""

    async def test_a_record_is_written_once_and_survives(self):
        client = await self.client()
        run, vm = str(uuid.uuid4()), str(uuid.uuid4())
        self.assertEqual(await client.execute("decide", run=run, value="abort"), {"value": "abort"})
        self.assertEqual(await client.execute("decide", run=run, value="commit"), {"value": "abort"})
        self.assertEqual(await client.execute("decide", run=run, vm=vm, value="source"), {"value": "source"})
        self.assertEqual(await client.execute("decide", run=run, vm=vm, value="destination"), {"value": "source"})
        records = {"group": "abort", f"vm-{vm}": "source"}
        self.assertEqual(await client.execute("query-decision", run=run), records)
        await client.close()
        await self.a.kill()
        await self.a.start()
        client = await self.client()
        self.assertEqual(await client.execute("query-decision", run=run), records)
        self.assertEqual(await client.execute("decide", run=run, value="commit"), {"value": "abort"})
        self.assertEqual(await client.execute("decide", run=run, value="abort"), {"value": "abort"})
        for _ in range(2):
            self.assertEqual(await client.execute("forget", run=run, epoch=1), {})
        self.assertEqual(await client.execute("query-decision", run=run), {})
        self.assertEqual(list((self.a.state / "register").iterdir()), [])

    async def test_a_race_has_one_winner(self):
        run = str(uuid.uuid4())
        clients = [await self.client() for _ in range(8)]
        values = ["commit", "abort"] * 4
        answers = await asyncio.gather(*(c.execute("decide", run=run, value=v) for c, v in zip(clients, values)))
        self.assertEqual(len({answer["value"] for answer in answers}), 1, answers)


class Starting(Case):
    """Sockets, modes, and configurations that are refused."""

    async def test_socket_mode(self):
        self.assertEqual(mode_of(self.a.socket), 0o660)

    async def test_a_second_sidecar_on_the_socket(self):
        second = self.a.run_to_end()
        self.assertNotEqual(second.returncode, 0)
        self.assertRegex(second.stderr, r"another sidecar (already serves .*control\.sock|uses the state directory .*state)")
        await self.assert_serves()

    async def test_tcp(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        await self.sidecar("t", control=f'tcp = "127.0.0.1:{port}"')
        client = await self.client(("127.0.0.1", port))
        self.assertEqual((await client.execute("query-status"))["host"], "t")
        taken = Sidecar(self.directory / "u", control=f'tcp = "127.0.0.1:{port}"').run_to_end()
        self.assertNotEqual(taken.returncode, 0)
        self.assertIn(f"127.0.0.1:{port}", taken.stderr)

    async def test_tcp_beyond_loopback_needs_consent(self):
        for name, options in (("control", {"control": 'tcp = "0.0.0.0:0"'}), ("stream", {"listen": "0.0.0.0:0"})):
            with self.subTest(name):
                ended = Sidecar(self.directory / name, **options).run_to_end()
                self.assertNotEqual(ended.returncode, 0)
                self.assertEqual(len(ended.stderr.splitlines()), 1, ended.stderr)
                self.assertIn(f"`{name}.insecure = true`", ended.stderr)
        open_one = await self.sidecar("v", control='tcp = "0.0.0.0:0"\ninsecure = true')
        self.assertTrue(any("insecure" in line for line in open_one.log), open_one.log)

    async def test_configurations_that_are_wrong(self):
        good = Sidecar(self.directory / "c")
        checked = good.run_to_end("--check")
        self.assertEqual(checked.returncode, 0, checked.stderr)
        self.assertIn(str(good.config), checked.stdout)
        text = good.config.read_text()
        name = '[[vm]]\nname = "web"\n'
        wrong = {
            "unknown key": (text + "speed = 1\n", "speed", True),
            "unknown table": (text + "[tls]\n", "tls", True),
            "wrong type": (text.replace("version = 1", 'version = "x"'), "version", True),
            "missing key": (text.replace('host = "a"\n', ""), "host", True),
            "no TOML": (text + "= 3\n", "line", True),
            "address": (text.replace("127.0.0.1:0", "nowhere"), "listen", True),
            "rate": (text + '[limits]\nlink = "fast"\n', "400Mbit/s", True),
            "version": (text.replace("version = 1", "version = 2"), "version", False),
            "any address": (text.replace("127.0.0.1:0", "0.0.0.0:1"), "`stream.listen`", False),
            "twice": (text + name + name, "twice", False),
            "not deferred": (text + name + 'incoming = ["qemu", "{qmp}"]\n', "-incoming defer", False),
        }
        for case, (content, key, has_line) in wrong.items():
            with self.subTest(case):
                good.config.write_text(content)
                ended = good.run_to_end("--check")
                self.assertNotEqual(ended.returncode, 0)
                self.assertIn(str(good.config), ended.stderr)
                self.assertIn(key, ended.stderr)
                if has_line:
                    self.assertRegex(ended.stderr, r"line \d+")
        good.config.unlink()
        self.assertIn("cannot be read", good.run_to_end("--check").stderr)


class Moving(Case):
    """Two sidecars, two QEMUs, one guest."""

    async def open(self):
        self.guest = Guest(self.directory, "web")
        self.addCleanup(self.end_guests)
        self.addAsyncCleanup(self.guest.stop)
        await self.guest.start()
        self.a = await self.sidecar("a", vms=self.guest.source_entry())
        self.b = await self.sidecar("b", vms=self.guest.template())
        self.source, self.destination = await self.client(self.a.socket), await self.client(self.b.socket)
        self.run_id = str(uuid.uuid4())
        self.begun = time.time()

    def at(self, epoch=1, **more):
        return {"run": self.run_id, "epoch": epoch, **more}

    async def both(self, command, **arguments):
        await asyncio.gather(*(c.execute(command, **arguments) for c in (self.source, self.destination)))

    async def keep_alive(self):
        while True:
            await self.both("keep-alive", **self.at())
            await asyncio.sleep(1)

    async def prepare(self, **more):
        """Both ends ready; returns the stream's address."""
        vm = {"vm": "web", "uuid": self.guest.uuid, "token": self.guest.token}
        common = self.at(register=self.a.address, report_interval_ms=200, vms=[vm], **more)
        for _ in range(2):  # once more changes nothing
            await self.destination.execute("prepare", role="destination", **common)
            await self.source.execute("prepare", role="source", **common)
        self.alive = asyncio.create_task(self.keep_alive())
        self.addCleanup(self.alive.cancel)
        prepared = (await self.source.wait_for("PREPARED", role="source", vm="web"))["data"]
        self.assertEqual(prepared["memory_bytes"], 32 << 20)
        self.assertRegex(prepared["qemu_version"], r"^\d+\.\d+\.\d+$")
        prepared = (await self.destination.wait_for("PREPARED", role="destination", vm="web"))["data"]
        self.assertRegex(prepared["stream"], r"^127\.0\.0\.1:\d+$")
        return prepared["stream"]

    async def ended(self):
        """RUN_ENDED on both sides; every event of the run is well-formed and none is missing."""
        reports = []
        for client in (self.source, self.destination):
            (report,) = (await client.wait_for("RUN_ENDED", run=self.run_id))["data"]["vms"]
            self.assertEqual(set(report), VM_REPORT)
            self.assertEqual(report["uuid"], self.guest.uuid)
            entered = [entry["at_us"] for entry in report["history"]]
            self.assertEqual(entered, sorted(entered))
            reports.append(report)
            mine = [event for event in client.events if event["data"]["run"] == self.run_id]
            self.assertEqual([event["data"]["seq"] for event in mine], list(range(1, len(mine) + 1)))
            stamps = [e["timestamp"]["seconds"] + e["timestamp"]["microseconds"] / 1e6 for e in mine]
            self.assertEqual(stamps, sorted(stamps))
            self.assertTrue(self.begun - 1 <= stamps[0] and stamps[-1] <= time.time() + 1)
            self.assertLessEqual({event["event"] for event in mine}, EVENTS)
        return reports

    async def forget(self):
        """The run's records go, and nothing of it stays on either host."""
        await self.both("forget", **self.at())
        await self.both("forget", **self.at())
        self.assertEqual(await self.source.execute("query-decision", run=self.run_id), {})
        for sidecar, client in ((self.a, self.source), (self.b, self.destination)):
            status = await client.execute("query-status")
            self.assertEqual(([run for run in status["runs"] if not run["ended"]], status["alarms"]), ([], []))
            self.assertEqual(list((sidecar.state / "register").iterdir()), [])
            self.assertEqual(list((sidecar.state / "runs").iterdir()), [])

    def left_behind(self, sidecar, *expected):
        """What lies in the runtime directory besides the control socket and QEMU's log."""
        found = {path.name for path in sidecar.runtime.iterdir()}
        return found - {"control.sock", "web.log", *expected}

    async def test_a_move_is_committed(self):
        stream = await self.prepare(throttle=True)
        for client in (self.source, self.destination):
            (run,) = (await client.execute("query-status"))["runs"]
            self.assertEqual((run["run"], run["phase"], run["decision"]), (self.run_id, "prepared", None))
        with self.assertRaises(ExecuteError):
            await self.source.execute("start", **self.at(vms={"db": stream}))
        for _ in range(2):
            await self.source.execute("start", **self.at(vms={"web": stream}))
        await self.source.execute("pace", **self.at(group_bytes_per_s=50_000_000, vms={"web": {"bytes_per_s": 40_000_000, "weight": 2.0}}))
        (settings,) = (await self.source.execute("query-settings"))["runs"]
        self.assertEqual(settings["group_bytes_per_s"], 50_000_000)
        self.assertEqual(settings["vms"], [{"vm": "web", "bytes_per_s": 40_000_000}])
        for weight in (0, -1):
            with self.assertRaises(ExecuteError):
                await self.source.execute("pace", **self.at(vms={"web": {"weight": weight}}))
        held = (await self.source.wait_for("HELD", vm="web"))["data"]
        self.assertIn(held["reason"], ("converged", "bounded"))
        self.assertEqual((await self.source.wait_for("ROUND", vm="web"))["data"]["round"], 1)

        await self.source.execute("throttle", **self.at(vm="web", percent=30))
        await self.source.wait_for("THROTTLED", vm="web", percent=30)
        for percent in (100, 255):
            with self.assertRaises(ExecuteError):
                await self.source.execute("throttle", **self.at(vm="web", percent=percent))
        await self.source.execute("throttle", **self.at(vm="web", percent=0))
        await self.source.wait_for("THROTTLED", vm="web", percent=0)
        with self.assertRaises(ExecuteError):
            await self.destination.execute("throttle", **self.at(vm="web", percent=1))

        for interval in (0, 19, 60_001):
            with self.assertRaises(ExecuteError):
                await self.source.execute("set-report-interval", **self.at(interval_ms=interval))
        await self.source.execute("set-report-interval", **self.at(interval_ms=20))
        after = len(self.source.events)
        for _ in range(5):
            await self.source.wait_for("STATUS", after=after, timeout=1)
            after = len(self.source.events)
        (report,) = self.source.events[-1]["data"].get("vms") or (await self.source.execute("query-run", run=self.run_id))["vms"]
        self.assertEqual((set(report), report["phase"], report["role"]), (VM_REPORT, "held", "source"))

        await self.source.execute("arm", **self.at())
        await self.source.wait_for("ARMED", vm="web")
        await self.source.execute("disarm", **self.at())
        await self.source.execute("arm", **self.at())
        await self.source.wait_for("ARMED", after=len(self.source.events), vm="web")
        await self.source.execute("release", **self.at())
        stopped = (await self.source.wait_for("STOPPED", vm="web"))["data"]
        self.assertLess(abs(stopped["stopped_at_us"] / 1e6 - time.time()), 5)
        self.assertFalse([e for e in self.source.events if e["event"] == "SWITCHING"], "nobody said `continue`")
        await self.source.execute("continue", **self.at())
        await self.source.wait_for("SWITCHING", vm="web")
        await self.source.wait_for("ARRIVED", vm="web", role="source")
        await self.destination.wait_for("ARRIVED", vm="web", role="destination")

        self.assertEqual(await self.source.execute("decide", run=self.run_id, value="commit"), {"value": "commit"})
        for _ in range(2):
            await self.destination.execute("commit", **self.at())
        await self.destination.wait_for("DECIDED", decision="commit")
        committed = (await self.destination.wait_for("COMMITTED", vm="web", role="destination"))["data"]
        self.assertGreater(committed["resumed_at_us"], stopped["stopped_at_us"])
        await self.source.execute("commit", **self.at())
        await self.source.execute("finish", **self.at(vms=["web"]))
        await self.source.wait_for("COMMITTED", vm="web", role="source")
        for report in await self.ended():
            self.assertEqual((report["phase"], report["error"]), ("committed", None))
        await asyncio.wait_for(self.guest.process.wait(), TIMEOUT)
        moved = await self.guest.look(self.b.runtime / "web.qmp")
        self.assertEqual((moved["status"], moved["uuid"]), ("running", self.guest.uuid))
        self.assertFalse([name for name, state in moved["capabilities"].items() if state and name != "events"])
        (pid,) = self.processes_at(self.b.runtime / "web.qmp")
        blocked = int(re.search(r"SigBlk:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.assertFalse(blocked >> (number - 1) & 1, "the guest cannot be ended by a signal")
        self.assertEqual(self.left_behind(self.a), set())
        self.assertEqual(self.left_behind(self.b, "web.qmp"), set())
        await self.forget()

    async def test_a_held_move_is_aborted(self):
        before = await self.guest.look()
        self.assertEqual(before["status"], "running")
        stream = await self.prepare()
        with self.assertRaises(ExecuteError) as refused:
            await self.source.execute("throttle", **self.at(vm="web", percent=30))
        self.assertIn("throttle: true", str(refused.exception))
        # So slow that only `hold` ends pre-copy.
        await self.source.execute("pace", **self.at(vms={"web": {"bytes_per_s": 20_000}}))
        await self.source.execute("start", **self.at(vms={"web": stream}))
        while (await self.source.execute("query-run", run=self.run_id))["phase"] != "precopy":
            await self.source.wait_for("STATUS", after=len(self.source.events))
        await self.source.execute("hold", **self.at(vm="web"))
        held = (await self.source.wait_for("HELD", vm="web"))["data"]
        self.assertEqual(held["reason"], "asked")
        with self.assertRaises(ExecuteError):
            await self.source.execute("hold", **self.at(vm="db"))
        during = await self.guest.look()
        self.assertEqual(during["status"], "running")
        self.assertTrue(during["capabilities"]["switchover-ack"])
        self.assertNotEqual(before["parameters"], during["parameters"])

        await self.both("keep-alive", **self.at(epoch=7))
        for epoch in (6, 0):
            with self.assertRaises(ExecuteError) as stale:
                await self.source.execute("release", **self.at(epoch=epoch))
            self.assertIn("stale epoch", str(stale.exception))
        self.at = lambda epoch=7, **more: {"run": self.run_id, "epoch": epoch, **more}

        with self.assertRaises(ExecuteError):
            await self.source.execute("forget", **self.at())
        for client in (self.source, self.destination):
            for _ in range(2):
                message = client.qmp.make_execute_msg("abort", self.at(), oob=True)
                await asyncio.wait_for(client.qmp.execute_msg(message), TIMEOUT)
        await self.source.wait_for("ROLLED_BACK", vm="web", role="source")
        await self.destination.wait_for("ROLLED_BACK", vm="web", role="destination")
        for report in await self.ended():
            self.assertEqual(report["phase"], "rolled-back")
        self.assertEqual(await self.guest.look(), before, "the guest's migration settings were not put back")
        self.assertFalse(self.processes_at(self.b.runtime / "web.qmp"), "the destination's QEMU lives")
        self.assertEqual(self.left_behind(self.a), set())
        self.assertEqual(self.left_behind(self.b), set())
        await self.forget()

    async def test_a_source_dies_together_with_its_sidecar(self):
        stream = await self.prepare()
        await self.source.execute("start", **self.at(vms={"web": stream}))
        for command, event in (
            (None, "HELD"), ("arm", "ARMED"), ("release", "STOPPED"), ("continue", "ARRIVED"),
        ):
            if command:
                await self.source.execute(command, **self.at())
            await self.source.wait_for(event)
        await self.destination.wait_for("ARRIVED")
        self.alive.cancel()
        await self.source.close()
        await self.a.kill()
        await self.guest.stop()
        await self.destination.close()
        self.assertTrue(self.processes_at(self.b.runtime / "web.qmp"), "the last copy is gone")
        self.destination = await self.client(self.b.socket)
        await self.a.start()
        diverged = (await self.destination.wait_for("DIVERGED"))["data"]
        self.assertEqual((diverged["vm"], diverged["side"]), ("web", "destination"))
        await self.destination.wait_for("RUN_ENDED")
        self.assertEqual((await self.guest.look(self.b.runtime / "web.qmp"))["status"], "running")
        self.source = await self.client(self.a.socket)
        records = {"group": "abort", f"vm-{self.guest.uuid}": "destination"}
        self.assertEqual(await self.source.execute("query-decision", run=self.run_id), records)
        await self.forget()

    def end_guests(self):
        """Ends what still runs of this test: sidecars leave their guests alone."""
        for pid in self.processes_at(self.directory):
            os.kill(int(pid), signal.SIGKILL)

    @staticmethod
    def processes_at(monitor):
        """Processes whose command line names this path."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(monitor).encode() in path.read_bytes():
                    found.append(path.parent.name)
        return found


if __name__ == "__main__":
    unittest.main(verbosity=2)
