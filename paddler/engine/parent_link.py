"""The engine process's end of the talk with its parent: blocking frames out, polled frames in."""

import os
import select
import socket
import threading

from paddler.engine.pipe import COMMANDS, Command, FrameReader, Report, pack

_READ_BYTES = 1 << 20


class ParentGone(Exception):
    """The parent closed the socket: the normal end."""


class ParentLink:
    """The socket to the parent, and what else wakes who waits for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader[Command](COMMANDS, max_frame_bytes=2**32 - 1)  # the parent is trusted
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._sending = threading.Lock()  # llama.cpp may log from any thread

    def wake_on(self, fd: int) -> None:
        """End the waiting of receive() when this pipe has a byte, too; receive() takes it out."""
        self._poll.register(fd, select.POLLIN)

    def send(self, report: Report) -> None:
        try:
            with self._sending:
                self._connection.sendall(pack(report))
        except OSError:
            raise ParentGone from None

    def receive(self, timeout_ms: int | None) -> list[Command]:
        """Return the commands that are there, after waiting for anything to happen if told to."""
        commands: list[Command] = []
        for fd, _ in self._poll.poll(timeout_ms):
            if fd != self._connection.fileno():
                os.read(fd, _READ_BYTES)
            elif data := self._read():
                commands += self._reader.feed(data)
            else:
                raise ParentGone
        return commands

    def receive_one(self) -> Command:
        """Wait for the next command, at a time when only one can come."""
        while True:
            commands = self.receive(None)
            if commands:
                [command] = commands
                return command

    def is_closed(self) -> bool:
        """Say whether the parent has gone, at a time when it has nothing to send."""
        return bool(self._poll.poll(0))

    def _read(self) -> bytes:
        try:
            return self._connection.recv(_READ_BYTES)
        except OSError:
            return b""
