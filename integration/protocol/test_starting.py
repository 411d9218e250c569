"""Sockets, modes and configurations at the start of a sidecar."""

import socket

from harness import Case, Sidecar, mode_of


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
