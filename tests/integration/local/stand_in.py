"""Stands in for a service: listens, answers every connection with 200, and ends on SIGTERM.

stand_in.py NAME LISTEN [--stubborn] [--child FILE] [--broken] [--told FILE]
    LISTEN      host:port, shared with others of its kind, or the path of a unix socket
    --stubborn  ignore SIGTERM
    --child     start a process in a session of its own, that sleeps, and write its pid to FILE
    --broken    say why, and end with status 3
    --told      append to FILE that it began, and that SIGTERM came
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("listen")
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--child", type=Path)
    parser.add_argument("--told", type=Path)
    arguments = parser.parse_args()
    if arguments.broken:
        sys.exit("error: the moon is in the wrong phase")
    if arguments.child:
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True
        )
        arguments.child.write_text(str(child.pid))

    def stop(*_: object) -> None:
        if arguments.told:
            with arguments.told.open("a") as told:
                told.write(f"{arguments.name} ended\n")
        if not arguments.stubborn:
            os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    host, _, port = arguments.listen.rpartition(":")
    if "/" in arguments.listen:
        Path(arguments.listen).unlink(missing_ok=True)  # left by the one before
        server = socket.socket(socket.AF_UNIX)
        server.bind(arguments.listen)
    else:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((host, int(port)))
    server.listen()
    print("listening", flush=True)
    if arguments.told:
        with arguments.told.open("a") as told:
            told.write(f"{arguments.name} began\n")
    while True:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


if __name__ == "__main__":
    main()
