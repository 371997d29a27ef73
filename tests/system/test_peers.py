"""A process that another one leaves alone ends with a sentence, even where nothing in it returns to Python."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, time
from matchai.system import peers
from matchai.system.processes import join_group, leave_group
peers.GRACE = 0.5
join_group(60.0)
with peers.watching_peers(2.0, end=lambda: os._exit(7)):
    if sys.argv[1] == "killed" and os.environ["RANK"] == "1":
        time.sleep(1)
        os._exit(9)
    time.sleep(60 if sys.argv[1] == "killed" else 4)
leave_group()
"""


@pytest.mark.parametrize(
    ("how", "statuses", "is_told"),
    [("killed", [7, 9], True), pytest.param("well", [0, 0], False, marks=pytest.mark.slow)],
)
def test_the_loss_of_a_peer_ends_a_process_and_its_end_does_not(how: str, statuses: list[int], is_told: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == statuses, said
    assert ("lost another" in said[0]) == is_told
