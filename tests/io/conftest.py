"""The hub, for the tests of files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest

from tests.io.hub_server import Hub


@pytest.fixture
def hub(tmp_path):
    """(run a script against the hub, the folder of its repositories, what was asked of it)"""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "asked": [], "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def run(script: str, **environment: str) -> list[str]:
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        env = {**os.environ, "NO_PROXY": "127.0.0.1", **home, **environment}
        if "HF_TOKEN" not in environment:
            env.pop("HF_TOKEN", None)
        out = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240
        )
        assert out.returncode == 0, out.stderr
        return out.stdout.splitlines()

    yield run, tmp_path / "hub", handler.asked
    server.shutdown()
    server.server_close()
