"""What a client can ask a sidecar, and how it answers; the register's records."""

import asyncio
import json
import re
import uuid

from qemu.qmp import ExecuteError

from harness import ROOT, Case
from vocabulary import COMMANDS, EVENTS, PROTOCOL, VM_REPORT


class Talking(Case):
    """Greeting, negotiation, answers, and queries."""

    sidecar_options = {"vms": '[[vm]]\nname = "web"\nadopt = true\n[[vm]]\nname = "db"\nqmp = "/nonexistent.qmp"\n'}

    async def test_qemu_qmp_greets_and_negotiates(self):
        client = await self.client()
        version = client.qmp.greeting.QMP.version
        self.assertEqual(version["muster"], PROTOCOL)
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
        self.assertEqual(set(status), {"host", "version", "uptime_ms", "runs", "alarms", "measured"})
        self.assertEqual(([run for run in status["runs"] if not run["ended"]], status["alarms"]), ([], []))
        self.assertEqual(status["measured"], [])
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
        self.assertEqual(
            set(vms["web"]), {"vm", "qmp", "qmp_present", "can_receive", "incoming_build", "disks"}
        )
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
            for command in ("query-vm", "dirty-start", "dirty-stop", "query-dirty"):
                answer = await raw.ask({"execute": command, "arguments": {"vm": name}})
                self.assert_error(answer, text="no name for a VM")

    async def test_measurements_that_cannot_be(self):
        raw = await self.raw()
        for arguments, text in (
            ({}, "not on this host"),
            ({"interval_ms": 0}, "`interval_ms` is 50 to 60000"),
            ({"interval_ms": 1 << 63}, "`interval_ms` is 50 to 60000"),
            ({"interval_ms": -1}, "interval_ms|u64"),
            ({"duration_ms": 0}, "`duration_ms` is 50 to 86400000"),
            ({"delays_ms": [0]}, "`delays_ms` is 1 to 3600000"),
            ({"delays_ms": [1] * 17}, "at most 16"),
            ({"heat_cells": 1025}, "`heat_cells` is 0 to 1024"),
            ({"cells": 1}, "unknown field"),
        ):
            answer = await raw.ask({"execute": "dirty-start", "arguments": {"vm": "db", **arguments}})
            self.assert_error(answer)
            self.assertRegex(answer["error"]["desc"], text)
        self.assert_error(await raw.ask({"execute": "query-dirty", "arguments": {"vm": "db"}}), text="not being measured")
        self.assertEqual(await raw.ask({"execute": "dirty-stop", "arguments": {"vm": "db"}}), {"return": {}})

    async def test_schema_lists_what_is_accepted(self):
        client, raw = await self.client(), await self.raw()
        schema = await client.execute("query-muster-schema")
        self.assertEqual(set(schema), {"protocol", "commands", "events"})
        self.assertEqual(schema["protocol"], PROTOCOL)
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
