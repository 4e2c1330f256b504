"""What the tests of damaged files share."""

import contextlib
import multiprocessing
import os
import signal
import struct
import traceback

import torch

# ==== damaged files: each ends in success or in one line that names it

FUZZ = int(os.environ.get("FUZZ", 1))  # so many times the cases
EXTREMES = 0, 1, -1, 255, 2**31 - 1, 2**63 - 1, -2**63


def damaged(rng, content, others):
    """`content` with bits flipped, cut, parts swapped, extremes, emptied, or one of `others`."""
    damage = bytearray(content)
    kind = rng.integers(6)
    if kind == 0:
        for at in rng.integers(0, len(damage), rng.integers(1, 20)):
            damage[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        damage = damage[:rng.integers(len(damage))]
    elif kind == 2:
        a, b = sorted(rng.integers(0, len(damage), 2))
        n = min(rng.integers(1, 64), b - a, len(damage) - b)
        damage[a:a + n], damage[b:b + n] = damage[b:b + n], damage[a:a + n]
    elif kind < 5:  # often in the header
        at = int(rng.integers(0, min(len(damage) - 8, 10 ** rng.integers(1, 6))))
        damage[at:at + 8] = struct.pack("<q", int(rng.choice(EXTREMES)))
    else:
        damage = others[rng.integers(len(others))] * int(rng.integers(0, 2))
    return bytes(damage)


def attempt(name, files, action):
    """Write the files, run action() -> "fine", "refused" (a line with `name`) or what is wrong."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    signal.alarm(30)  # a hang ends the process
    said = "fine"
    try:
        action()
    except Exception as error:
        mistake = isinstance(error, (ValueError, OSError))
        named = str(name) in str(error) and "\n" not in str(error)
        said = "refused" if mistake and named else traceback.format_exc()
    signal.alarm(0)
    changed = [str(path) for path, content in files.items() if path.read_bytes() != content]
    return f"changed: {changed}" if changed else said


def survive(cases, least=10):
    """Every case, (what, name, files, action) for `attempt`, is fine or refused, `least` of each.

    One child process runs them all, so that a crash of the interpreter shows the case it was in.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        for what, *case in cases:
            theirs.send(what)
            theirs.send(attempt(*case))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()
    found = {"fine": 0, "refused": 0}
    what = ""
    with contextlib.suppress(EOFError):
        while True:
            what = ours.recv()
            said = ours.recv()
            found.setdefault(said, what)
            if said in ("fine", "refused"):
                found[said] += 1
    process.join()
    assert process.exitcode == 0, f"{what}: the process ended with status {process.exitcode}"
    assert len(found) == 2, "\n".join(f"{what}: {said}" for said, what in list(found.items())[2:])
    assert min(found.values()) >= least, found
