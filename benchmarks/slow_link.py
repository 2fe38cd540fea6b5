"""Ranks that a really slow link joins: network namespaces of this machine, shaped by ``tc``. Linux, as root.

    sudo python benchmarks/slow_link.py -- benchmarks/allreduce.py --backend gloo --sizes 8M 16M 32M
    sudo python benchmarks/slow_link.py --ranks 3 --rate 100mbit -- my_script.py

Every rank gets a namespace with one interface, which a bridge in a further namespace joins to the others, and runs the given
Python script with the variables that torchrun sets. What a rank sends and what it receives is shaped to the rate by a token
bucket. Before the script runs, all ranks send to their neighbours at once, and the rate that they see is printed. Everything
is removed at the end, also after a failure or a signal; nothing outside the namespaces changes.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ranks import SHAPED, wait

INTERFACE = "slow0"
PORT, PROBE_PORT = 29500, 29501
BURST = "256kb"  # several of the 64 KB packets that the kernel hands over at once, 2 ms at 1 Gbit/s
QUEUE = "50ms"  # what the bucket holds back before it drops
PROBE_BYTES = 16 << 20


class Failure(Exception):
    """The link cannot be set up."""


def command(*words: str) -> None:
    """Run ``ip`` or ``tc``; their message on failure."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


def shape(namespace: str, interface: str, rate: str) -> None:
    """Bring an interface up whose outgoing packets are held to the rate."""
    inside = ("ip", "netns", "exec", namespace)
    command(*inside, "ip", "link", "set", interface, "up")
    command(
        *inside, "tc", "qdisc", "add", "dev", interface, "root", "tbf", "rate", rate, "burst", BURST, "latency", QUEUE
    )


@contextmanager
def namespaces(ranks: int, rate: str) -> Iterator[list[str]]:
    """One namespace for each rank, which has the address ``address(rank)``; removed at the end."""
    prefix = f"slow{os.getpid()}"
    hub, names = f"{prefix}hub", [f"{prefix}r{rank}" for rank in range(ranks)]
    made = []
    try:
        for name in (hub, *names):
            command("ip", "netns", "add", name)
            made.append(name)
            command("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
        command("ip", "netns", "exec", hub, "ip", "link", "add", "bridge", "type", "bridge")
        command("ip", "netns", "exec", hub, "ip", "link", "set", "bridge", "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            pair = ("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            command(*pair)
            command("ip", "-n", hub, "link", "set", port, "master", "bridge")
            command("ip", "-n", name, "address", "add", f"{address(rank)}/24", "dev", INTERFACE)
            shape(hub, port, rate)
            shape(name, INTERFACE, rate)
        yield names
    finally:
        for name in made:  # interfaces go with their namespace
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def address(rank: int) -> str:
    """Where a rank listens."""
    return f"10.203.17.{rank + 1}"


def environment(rank: int, ranks: int, rate: str) -> dict[str, str]:
    """Variables of a rank: as torchrun sets them, each rank on a host of its own."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        SHAPED: f"{rate} in namespaces",
    }


def start(names: list[str], rate: str, script: list[str]) -> list[subprocess.Popen]:
    """The script, once in each namespace."""
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, *script],
            env={**os.environ, **environment(rank, len(names), rate)},
        )
        for rank, name in enumerate(names)
    ]


def probe(rank: int, ranks: int) -> None:
    """Send to the next rank and receive from the last at once; rank 0 prints the rate that it received at."""
    listener = socket.create_server((address(rank), PROBE_PORT))
    sender = connect(address((rank + 1) % ranks))
    receiver, _ = listener.accept()
    sending = threading.Thread(target=lambda: sender.sendall(bytes(PROBE_BYTES)))
    begin = time.perf_counter()
    sending.start()
    left = PROBE_BYTES
    while left:
        left -= len(receiver.recv(min(left, 1 << 20)))
    seconds = time.perf_counter() - begin
    sending.join()
    if rank == 0:
        print(f"slow_link: {PROBE_BYTES * 8 / seconds / 1e6:.0f} Mbit/s both ways at once", file=sys.stderr, flush=True)


def connect(host: str) -> socket.socket:
    """A connection to a rank that may not listen yet."""
    for _ in range(200):
        try:
            return socket.create_connection((host, PROBE_PORT), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise Failure(f"no rank listens on {host}")


def stop(*_: object) -> None:
    """For signals: end through ``finally``."""
    raise SystemExit("slow_link: stopped")


def main(argv: list[str] | None = None) -> int:
    """Set the link up, run the script in every rank, take the link down; the exit status of a rank that failed, else 0."""
    parser = argparse.ArgumentParser(prog="slow_link", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", default="1gbit", help="as tc takes it, such as 100mbit")
    parser.add_argument("--seconds", type=float, default=900.0, help="after which the ranks are killed")
    parser.add_argument("script", nargs="+", help="a Python script and its arguments, after --")
    args = parser.parse_args(argv)
    if args.script == ["probe"] and "RANK" in os.environ:
        probe(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return 0
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise SystemExit("slow_link: network namespaces need Linux and root; run it with sudo")
    if args.ranks < 2:
        parser.error("--ranks must be at least 2")
    signal.signal(signal.SIGTERM, stop)
    try:
        with namespaces(args.ranks, args.rate) as names:
            return wait(start(names, args.rate, [__file__, "probe"]), 60) or wait(
                start(names, args.rate, args.script), args.seconds
            )
    except (Failure, FileNotFoundError) as failure:
        raise SystemExit(f"slow_link: {failure}") from failure


if __name__ == "__main__":
    sys.exit(main())
