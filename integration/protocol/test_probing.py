"""Probes of the bandwidth between two sidecars: what they find, refuse, and survive."""

import asyncio
import os
import signal
import socket
import time
import uuid
from contextlib import suppress

from qemu.qmp import ExecuteError

from harness import Case
from vocabulary import prepare_arguments


class Probing(Case):
    """Two sidecars, one loopback."""

    async def open(self):
        self.a = await self.sidecar("a", vms='[[vm]]\nname = "web"\nqmp = "/nonexistent.qmp"\n')
        self.b = await self.sidecar("b")
        self.source = await self.client(self.a.socket)
        self.destination = await self.client(self.b.socket)

    async def expect(self, token=None):
        """Has b expect a probe; its arguments for a."""
        arguments = {"probe": str(uuid.uuid4()), "token": token or os.urandom(32).hex()}
        address = await self.destination.execute("probe-listen", **arguments)
        return {**arguments, "stream": address["stream"]}

    async def refused(self, text, client=None, command="probe", **arguments):
        """The command is refused with this in its error."""
        with self.assertRaises(ExecuteError) as refused:
            await (client or self.source).execute(command, **arguments)
        self.assertIn(text, str(refused.exception))

    async def probe(self, **arguments):
        """Sends a probe and returns what it found."""
        after = len(self.source.events)
        await self.source.execute("probe", **arguments)
        event = await self.source.wait_for("PROBED", after, probe=arguments["probe"])
        self.assertEqual(
            set(event["data"]),
            {"probe", "acked_bytes", "duration_us", "bytes_per_s", "settled", "rtt_us", "error"},
        )
        return event["data"]

    async def test_a_probe_finds_a_rate_within_its_bounds(self):
        arguments = await self.expect()
        found = await self.probe(**arguments, duration_ms=300, max_bytes=16 << 20)
        self.assertIsNone(found["error"])
        self.assertGreater(found["bytes_per_s"], 10_000_000)
        self.assertLessEqual(found["acked_bytes"], 16 << 20)
        self.assertLess(found["duration_us"], 1_000_000)
        self.assertGreater(found["rtt_us"], 0)
        # Its token is used up.
        again = await self.probe(**arguments)
        self.assertIn("does not expect this probe", again["error"])
        self.assertIsNone(again["bytes_per_s"])
        # Only who began it is told.
        self.assertEqual([e for e in self.destination.events if e["event"] == "PROBED"], [])

    async def test_a_wrong_token_is_refused(self):
        arguments = await self.expect()
        found = await self.probe(**{**arguments, "token": "00" * 32})
        self.assertIn("does not expect this probe", found["error"])
        self.assertEqual(found["acked_bytes"], 0)
        # It is still there for who knows the token.
        self.assertIsNone((await self.probe(**arguments, duration_ms=50))["error"])

    async def test_bad_arguments_are_refused(self):
        good = {"probe": str(uuid.uuid4()), "token": "ab" * 32, "stream": "127.0.0.1:9"}
        for change, text in (
            ({"token": "ab"}, "`token` is 64 hexadecimal digits"),
            ({"stream": "b:4601"}, "is no stream address"),
            ({"duration_ms": 10_001}, "`duration_ms` is 10 to 10000"),
            ({"duration_ms": 9}, "`duration_ms` is 10 to 10000"),
            ({"max_bytes": (1 << 30) + 1}, "`max_bytes` is 65536 to 1073741824"),
            ({"max_bytes": 0}, "`max_bytes` is 65536 to 1073741824"),
            ({"max_bytes": -1}, "expected u64"),
        ):
            await self.refused(text, **{**good, **change})
        await self.refused("64 hexadecimal", command="probe-listen", probe=good["probe"], token="x")
        known = await self.expect()
        await self.refused(
            "is expected already", self.destination, "probe-listen", probe=known["probe"], token=known["token"]
        )
        for _ in range(15):
            await self.expect()
        await self.refused(
            "16 probes", self.destination, "probe-listen", probe=str(uuid.uuid4()), token=known["token"]
        )

    async def test_nobody_there_is_said(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        found = await self.probe(probe=str(uuid.uuid4()), token="ab" * 32, stream=f"127.0.0.1:{port}")
        self.assertIn("refused", found["error"])

    async def test_a_hanging_destination_ends_it(self):
        for stopped_before in (True, False):
            arguments = await self.expect()
            if stopped_before:
                self.b.process.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            await self.source.execute("probe", **arguments, duration_ms=1500, max_bytes=1 << 30)
            try:
                if not stopped_before:
                    await asyncio.sleep(0.01)
                    self.b.process.send_signal(signal.SIGSTOP)
                await self.refused("is under way already", **arguments)
                # The source's sidecar answers meanwhile.
                asked = time.monotonic()
                await self.source.execute("query-status")
                self.assertLess(time.monotonic() - asked, 0.5)
                found = (await self.source.wait_for("PROBED", probe=arguments["probe"]))["data"]
            finally:
                self.b.process.send_signal(signal.SIGCONT)
            self.assertLess(time.monotonic() - begun, 4)
            self.assertIn("did not answer within 2 s" if stopped_before else "hangs", found["error"])
            self.assertIsNone(found["bytes_per_s"])

    async def test_a_dying_destination_ends_it(self):
        arguments = await self.expect()
        await self.source.execute("probe", **arguments, duration_ms=10_000, max_bytes=1 << 30)
        await self.b.kill()
        begun = time.monotonic()
        found = (await self.source.wait_for("PROBED", probe=arguments["probe"]))["data"]
        self.assertLess(time.monotonic() - begun, 2)
        self.assertTrue(found["error"] or found["acked_bytes"] == 1 << 30, found)
        with suppress(EOFError):
            await self.destination.close()

    async def test_a_destination_that_hangs_up_or_is_no_sidecar(self):
        async def serve(answer):
            async def one(reader, writer):
                await reader.readexactly(73)
                writer.write(answer)
                await writer.drain()
                writer.close()

            server = await asyncio.start_server(one, "127.0.0.1", 0)
            self.addCleanup(server.close)
            return "127.0.0.1:%d" % server.sockets[0].getsockname()[1]

        for answer, text in ((b"", "hung up"), (b"\x63", "is no muster-sidecar"), (b"\x01", "hung up"), (b"\x03", "version")):
            stream = await serve(answer)
            found = await self.probe(probe=str(uuid.uuid4()), token="ab" * 32, stream=stream)
            self.assertIn(text, found["error"], answer)

    async def test_a_vanished_client_ends_it(self):
        arguments = await self.expect()
        raw = await self.raw()
        sent = {**arguments, "duration_ms": 10_000, "max_bytes": 1 << 30}
        self.b.process.send_signal(signal.SIGSTOP)
        try:
            self.assertEqual(await raw.ask({"execute": "probe", "arguments": sent}), {"return": {}})
            raw.close()
            by = time.monotonic() + 1
            # The place is free again before the two seconds of an answer are over.
            while True:
                try:
                    await self.source.execute("probe", **sent)
                    break
                except ExecuteError as error:
                    self.assertIn("under way", str(error))
                    self.assertLess(time.monotonic(), by)
                    await asyncio.sleep(0.01)
        finally:
            self.b.process.send_signal(signal.SIGCONT)
        # And one that is expected goes with who asked for it.
        other = await self.client(self.b.socket)
        wanted = {"probe": str(uuid.uuid4()), "token": "cd" * 32}
        await other.execute("probe-listen", **wanted)
        await other.close()
        by = time.monotonic() + 2
        while True:
            try:
                await self.destination.execute("probe-listen", **wanted)
                break
            except ExecuteError:
                self.assertLess(time.monotonic(), by)

    async def test_no_probe_while_vms_are_moved(self):
        await self.source.execute("prepare", **prepare_arguments(self.a))
        arguments = await self.expect()
        try:
            await self.source.execute("probe", **arguments)
        except ExecuteError as error:
            self.assertIn("being moved here", str(error))
        else:
            # Its QEMU does not exist: the run may have ended already.
            status = await self.source.execute("query-status")
            self.assertTrue(all(run["ended"] for run in status["runs"]), status)

    async def test_a_move_ends_probes(self):
        arguments = await self.expect()
        expected = await self.expect()
        begun = time.monotonic()
        await self.source.execute("probe", **arguments, duration_ms=10_000, max_bytes=1 << 30)
        # The destination's end of it hangs, so that it cannot be over by itself.
        self.b.process.send_signal(signal.SIGSTOP)
        try:
            await self.source.execute("prepare", **prepare_arguments(self.a))
            found = (await self.source.wait_for("PROBED", probe=arguments["probe"]))["data"]
            self.assertIn("going to be moved", found["error"])
            self.assertIsNone(found["bytes_per_s"])
            self.assertLess(time.monotonic() - begun, 1.5)
        finally:
            self.b.process.send_signal(signal.SIGCONT)
        # A move at the other end forgets what is expected there.
        await self.destination.execute("prepare", **prepare_arguments(self.b))
        await self.ended(self.destination)
        self.assertEqual(
            await self.destination.execute("probe-listen", probe=expected["probe"], token=expected["token"]),
            {"stream": expected["stream"]},
        )

    async def ended(self, client):
        """Waits until every run is over there: their QEMUs do not exist."""
        by = time.monotonic() + 10
        while not all(run["ended"] for run in (await client.execute("query-status"))["runs"]):
            self.assertLess(time.monotonic(), by)
            await asyncio.sleep(0.05)

    async def test_one_that_does_not_come_is_forgotten(self):
        arguments = await self.expect()
        wanted = {"probe": arguments["probe"], "token": arguments["token"]}
        begun = time.monotonic()
        while True:
            try:
                await self.destination.execute("probe-listen", **wanted)
                break
            except ExecuteError as error:
                self.assertIn("is expected already", str(error))
                self.assertLess(time.monotonic() - begun, 7)
                await asyncio.sleep(0.1)
        self.assertGreater(time.monotonic() - begun, 4)
