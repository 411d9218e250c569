"""A guest moves between two sidecars: two real QEMU processes under TCG, driven by qemu.qmp."""

import asyncio
import os
import re
import signal
import time
import uuid
from contextlib import suppress
from pathlib import Path

from qemu.qmp import ExecuteError

from harness import TIMEOUT, Case, Guest
from vocabulary import EVENTS, VM_REPORT


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
