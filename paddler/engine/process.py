"""Entry of the engine process: `python -m paddler.engine.process FD`, FD being its end of a socket pair.

It lives and dies with its parent, whatever happens to either; the work is in worker.py.
"""

import ctypes
import os
import signal
import socket
import struct
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    _bind_to_parent(connection)
    # Only now what takes a fifth of a second to import: a parent that dies meanwhile takes us along.
    from paddler.engine import worker

    try:
        worker.run(connection)
    except worker.ParentGone:
        # The normal end. Nothing is left to flush, and neither llama.cpp's destructors nor a thread that
        # tokenises a long prompt are worth waiting for.
        os._exit(0)


def _bind_to_parent(connection: socket.socket) -> None:
    """Die when the parent dies, and leave Ctrl-C, which the whole foreground group gets, to it.

    Elsewhere than on Linux the parent's end is noticed between turns, by the end of the stream.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    parent, _, _ = struct.unpack("3i", credentials)
    if os.getppid() != parent:  # it died before prctl() was in force
        os._exit(0)


if __name__ == "__main__":
    main()
