"""A child process's bond to its parent: never outlive it, and leave Ctrl-C to it."""

import ctypes
import os
import signal
import socket
import struct
import sys

_PR_SET_PDEATHSIG = 1


def bind_to_parent(connection: socket.socket) -> None:
    """Die when the parent dies, which made the socket pair of this end; ignore SIGINT.

    The whole foreground group gets a Ctrl-C. Elsewhere than on Linux the parent's end is noticed by the
    end of the stream.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    parent, _, _ = struct.unpack("3i", credentials)
    if os.getppid() != parent:  # it died before prctl() was in force
        os._exit(0)
