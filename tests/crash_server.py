# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Server that runs tools in forked processes, for tests of crashes.

The server has imported everything, so a run takes less than a second. It reads a line of JSON for
each run: the command as a list, the folder to run in, the largest number of mapped bytes, and the
largest number of seconds. It answers with a line: the exit status (None if the time was too short)
and the peak of the resident memory in kB. The output of a run is in output.txt in its folder.
"""

import faulthandler
import json
import os
import resource
import runpy
import signal
import sys
import time
from typing import Any, NoReturn

import torch
from engine_runs import quick_set_up  # also imports the modules of tools


def serve() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request)
        print(json.dumps(wait(pid, request["seconds"])), flush=True)


def wait(pid: int, seconds: float) -> tuple[int | None, int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return None, os.wait4(pid, 0)[2].ru_maxrss


def run(request: dict[str, Any]) -> NoReturn:
    """Run a tool in this process, and end the process."""
    os.chdir(request["folder"])
    for descriptor, name in ((0, os.devnull), (1, "output.txt"), (2, "output.txt")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
    sys.argv = request["command"]
    with quick_set_up():
        runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve()
