"""Entry of the engine process: `python -m paddler.engine.process FD`, FD being its end of a socket pair.

It lives and dies with its parent, whatever happens to either; the work is in worker.py.
"""

import os
import socket
import sys

from paddler.processes.parent import bind_to_parent


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    bind_to_parent(connection)
    # Only now what takes a fifth of a second to import: a parent that dies meanwhile takes us along.
    from paddler.engine import parent_link, worker

    try:
        worker.run(connection)
    except parent_link.ParentGone:
        # The normal end. Nothing is left to flush, and neither llama.cpp's destructors nor a thread that
        # tokenises a long prompt are worth waiting for.
        os._exit(0)


if __name__ == "__main__":
    main()
