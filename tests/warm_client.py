"""The process that a launcher starts in place of a rank: it hands all that it was given to the server of `warm_start`.

`python warm_client.py SOCKET ARGUMENTS...`, where ARGUMENTS are Python's own. Standard streams, the launcher's socket,
environment and folder go to a fork of the server, which does the work; this process lives as long, and ends alike.
Imports little, since that is what it is for.
"""

import json
import os
import signal
import socket
import sys

# The environment's name of the socket over which MPICH's launcher talks with a rank.
LAUNCHER_SOCKET = "PMI_FD"
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


def main() -> None:
    path, *arguments = sys.argv[1:]
    if LAUNCHER_SOCKET not in os.environ and any(name in os.environ for name in _LAUNCHERS):
        # Another launcher may look for the rank under the number of this process.
        os.execv(sys.executable, [sys.executable, *arguments])
    passed = [0, 1, 2]
    if LAUNCHER_SOCKET in os.environ:
        passed.append(int(os.environ[LAUNCHER_SOCKET]))
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(request).to_bytes(8, "big")], passed)
        server.sendall(request)
        answer = server.recv(64)
    if not answer:
        os._exit(1)
    status = int(answer)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
