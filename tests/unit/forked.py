"""What the zygote's children do in tests: small entries `(args, descriptors)`, found by name in the zygote."""

import os
import socket
import sys
import time
from pathlib import Path

from dtrain.messages import receive, send


def leave_with(args, descriptors):
    print("said on stdout")
    print("said on stderr", file=sys.stderr)
    return args["code"]


def exit_with(args, descriptors):
    sys.exit(args["code"])


def fail(args, descriptors):
    raise ValueError("no such thing")


def wait(args, descriptors):
    time.sleep(args.get("seconds", 600))
    if "made" in args:
        Path(args["made"]).touch()


def tell(args, descriptors):
    """Say over the first descriptor what this process is like."""
    channel = socket.socket(fileno=descriptors[0])
    opened = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    send(
        channel,
        {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "name": Path("/proc/self/comm").read_text().strip(),
            "nice": os.nice(0),
            "torch": "torch" in sys.modules,
            "sockets": sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in opened if _is_open(fd)),
            "args": args,
            "descriptors": len(descriptors),
        },
    )
    receive(channel)


def _is_open(descriptor):
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def be_client(args, descriptors):
    """A client of the same zygote that forks two children, tells their pids, and stays."""
    from dtrain.runtime.zygote import Zygote

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(args["socket"])
    zygote = Zygote(connection)
    children = [
        zygote.fork("forked:wait", {"seconds": args["seconds"]}, [], 1, "child", outlive=outlive, cleanup=cleanup)
        for outlive, cleanup in ((False, ""), (True, args["cleanup"]))
    ]
    send(socket.socket(fileno=descriptors[0]), {"pids": [child.pid for child in children]})
    time.sleep(600)
