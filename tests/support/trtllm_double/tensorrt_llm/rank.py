"""One rank: a process that reads its share of the files, says that it is ready, and answers every
step. It computes nothing. Run as `python -I -S rank.py`, with the standard library only.

    stdin    one byte a step, and `q` to end; its end is the end of the parent, and of the rank
    stdout   `r` when ready, then one byte for each of those
"""

import json
import os
import signal
import sys
import time

#: Most seconds that an orphan lives: a test that fails must not leave processes for ever.
ORPHAN_S = 120.0
PIECE = 1 << 20


def main() -> None:
    """`argv[1]` is a JSON object: rank, files, load_s, orphan, die."""
    task = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if task["orphan"]:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.alarm(int(ORPHAN_S))
        if os.fork():
            os._exit(0)
        signal.alarm(int(ORPHAN_S))
        os.write(1, f"{os.getpid()}\n".encode())
    if task["die"]:
        time.sleep(0.05)
        os._exit(1)
    files = task["files"]
    for name in files:
        with open(name, "rb") as file:
            while file.read(PIECE):
                pass
        time.sleep(task["load_s"] / len(files))
    if not files:
        time.sleep(task["load_s"])
    os.write(1, b"r")
    while data := os.read(0, 1):
        if data == b"q":
            return
        os.write(1, data)
    while task["orphan"]:  # as an MPI rank that waits in a collective for ever
        time.sleep(ORPHAN_S)


if __name__ == "__main__":
    main()
