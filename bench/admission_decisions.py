"""What one decision of admission costs: processor time of the state machine alone, without Ray.

    python bench/admission_decisions.py [--waiting 10000] [--keys 100] [--replicas 8] [--json]

The queue is filled; then a sequence leaves, another gets its place, and a new one enters, again and
again. `places`: replicas are short of places. `kv`: they are short of KV, so that heads which do
not fit are looked past, which is the dearer case. `full`: every newcomer is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from support.admissions import INGRESS, Office, enter, granted, status

from serve_app.routing.tickets import Leave, Terms

ROUNDS = 2000


def measure(case: str, waiting: int, keys: int, replicas: int) -> dict[str, float]:
    """Microseconds of processor time per decision."""
    numbers = random.Random(0)
    office = Office(
        *(status(f"r{i}", kv=64_000 if case == "kv" else 10**9) for i in range(replicas)),
        places=10**6 if case == "kv" else 64,
        max_queued_requests=waiting if case == "full" else 10 * waiting,
        max_wait_s=1e6,
    )
    terms = [Terms(name=f"k{i}", priority=i % 3, weight=1 + i % 2) for i in range(keys)]
    held: dict[str, str] = {}
    count = 0

    def come() -> None:
        nonlocal count
        count += 1
        request = enter(f"q{count}", numbers.choice(terms), tokens=numbers.randint(50, 2000))
        held.update(granted(office.admission.take(INGRESS, [request])))

    start = time.process_time()
    for _ in range(waiting):
        come()
    fill = (time.process_time() - start) / waiting
    start = time.process_time()
    for _ in range(ROUNDS):
        if case != "full":
            sequence_id = next(iter(held))
            del held[sequence_id]
            leave = Leave(sequence_id=sequence_id, used_tokens=60)
            held.update(granted(office.admission.take(INGRESS, [leave])))
        come()
    each = (time.process_time() - start) / ROUNDS / (1 if case == "full" else 2)
    start = time.process_time()
    office.admission.tick()
    tick = time.process_time() - start
    return {"filling_us": fill * 1e6, "decision_us": each * 1e6, "tick_us": tick * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = {
        case: measure(case, given.waiting, given.keys, given.replicas)
        for case in ("places", "kv", "full")
    }
    if given.json:
        print(json.dumps(rows))
        return
    for case, row in rows.items():
        print(f"{case:8}", "  ".join(f"{name} {value:7.1f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
