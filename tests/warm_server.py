"""A process that has imported torch, and forks itself for every rank that `warm_client` asks for.

`python warm_server.py SOCKET`: listens there until its standard input ends. A fork takes over the client's standard
streams, launcher's socket, environment and folder, and runs Python's arguments `-m MODULE ...` or `-c PROGRAM ...` as
a new Python would; nothing of the tested package is imported before. A client that dies takes its fork with it.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import types
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Request:
    """What one client asks for, and the descriptors it sent: standard streams, and the launcher's socket if any."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    descriptors: list[int]


def receive(connection: socket.socket) -> Request:
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 4, socket.MSG_WAITALL)
    length = int.from_bytes(head, "big")
    body = bytearray()
    while len(body) < length:
        piece = connection.recv(length - len(body))
        if not piece:
            raise ConnectionError("the client has gone")
        body += piece
    return Request(**json.loads(body), descriptors=descriptors)


def serve(path: str) -> Request | None:
    """Fork for every client. Returns its request in a fork, and None in the server itself once nobody needs it."""
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    # Whoever sees the socket can connect to it.
    os.rename(f"{path}.new", path)
    selector.register(listener, selectors.EVENT_READ, None)
    selector.register(0, selectors.EVENT_READ, None)
    clients: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                for pid, _ in clients.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                try:
                    request = receive(connection)
                except (ConnectionError, ValueError):
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for inherited in (listener, connection, *(other for _, other in clients.values())):
                        inherited.close()
                    for descriptor in clients:
                        os.close(descriptor)
                    return request
                for descriptor in request.descriptors:
                    os.close(descriptor)
                ended = os.pidfd_open(pid)
                clients[ended] = pid, connection
                selector.register(ended, selectors.EVENT_READ, ended)
                selector.register(connection, selectors.EVENT_READ, ended)
            elif key.data in clients:
                pid, connection = clients[key.data]
                if key.fileobj is connection:
                    os.kill(pid, signal.SIGKILL)
                    selector.unregister(connection)
                    continue
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                selector.unregister(key.data)
                os.close(key.data)
                connection.close()
                del clients[key.data]


def become(request: Request, library_path: list[str]) -> None:
    """Take over what the client has."""
    for number, each in enumerate(request.descriptors[:3]):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(request.environment)
    if len(request.descriptors) > 3:
        os.environ["PMI_FD"] = str(request.descriptors[3])
    os.chdir(request.folder)
    modules = [each for each in request.environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = ["", *modules, *library_path]


def run(arguments: list[str]) -> None:
    """Do as Python does with `-m MODULE ...` or `-c PROGRAM ...`."""
    how, what, *rest = arguments
    if how == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest]
        main: Any = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), main.__dict__)
    else:
        raise ValueError(f"{how}: only -m and -c can be run here")


def preload() -> None:
    import torch
    import torch._dynamo  # which torch's optimizers import
    import torch.distributed

    assert len(os.listdir("/proc/self/task")) == 1, f"importing torch {torch.__version__} starts threads"
    # Collecting garbage would write to what forks share, and so copy it.
    gc.collect()
    gc.freeze()


def status_of(arguments: list[str]) -> int:
    """Run, and return the status that Python would end with."""
    try:
        run(arguments)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> NoReturn:
    """End as Python does, but for taking all modules to pieces, which would copy what forks share."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # As at Python's own end no daemon thread may run from here on, and call MPI: none is given the lock of Python.
    sys.setswitchinterval(1000)
    time.sleep(0.02)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        ctypes.PyDLL(mpi.__file__).MPI_Finalize()
    # MPICH takes leave of the launcher in a function that C calls at the end.
    ctypes.PyDLL(None).exit(status)
    raise AssertionError


if __name__ == "__main__":
    found = sys.path[1:]
    preload()
    wanted = serve(sys.argv[1])
    if wanted is not None:
        become(wanted, found)
        end(status_of(wanted.arguments))
