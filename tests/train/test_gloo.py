"""What torch leaves to be done about gloo's groups: connections, and threads at the end."""

from __future__ import annotations

import socket
import subprocess
import sys

from lowrank.train.gloo import Connections

# A thread of gloo's waits for the interpreter, which has begun to end when it is free at last.
AT_THE_END = """
import sys
import time
import torch
import torch.distributed as dist
from lowrank.train.gloo import settle_at_exit

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
tensor = torch.ones(10_000_000)
settle_at_exit()

class Last:
    def __del__(self, sleep=time.sleep):
        sleep(0.1)

last = Last()
sys.setswitchinterval(60)
dist.all_gather([torch.empty_like(tensor)], tensor, async_op=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    pass
"""


def test_threads_at_the_end():
    """Without settle_at_exit this very program is aborted."""
    words = [sys.executable, "-c", AT_THE_END]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_connections():
    """The other end of what was opened inside sees it closed, however many hold it; no other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        place = server.getsockname()
        with socket.create_connection(place) as before:
            there_before, _ = server.accept()
            with Connections() as connections:
                inside, listener = socket.create_connection(place), socket.create_server(("", 0))
            there_inside, _ = server.accept()
            held = inside.dup()
            connections.close()
            connections.close()
            there_inside.settimeout(10)
            assert there_inside.recv(1) == b""
            before.send(b"x")
            assert there_before.recv(1) == b"x"
            with socket.create_connection(listener.getsockname()):
                assert listener.accept()[0].close() is None
            for one in (there_before, inside, held, there_inside, listener):
                one.close()
            connections.close()
