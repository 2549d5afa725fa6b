"""Completions that attack, and rewards that do what a completion says. Imported in reward workers: keep it light."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dppo_lightning.reward.base import Sample, Score

SECRET = "WALL_CANARY_KEY"
"""Environment variable of the trainer that no completion may read."""

READ_ENVIRONMENT = f"""
import glob, os
found = [os.environ.get('{SECRET}')]
for path in glob.glob('/proc/*/environ'):
    try:
        found.append('{SECRET}' if '{SECRET}' in open(path).read() else None)
    except OSError:
        pass
value = float(any(found))
"""
KILL = """
import os
for pid in (os.getppid(), {victim}):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
value = 0.5
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(0.01)
            open({file!r}, 'w').write('x')
value = 0.5
"""


def attacks(file: Path, port: int, victim: int) -> dict[str, tuple[str, str]]:
    """Programs by name, each with the kinds of failure that may follow; "" where it may be scored, with 0.5.

    On a machine without a wall they harm nobody but the worker and what is named here: no ``kill(-1)``, no fork bomb.

    Args:
        file: Path that none may write to; nobody may read it either.
        port: Port on which somebody listens.
        victim: Process that some try to end.
    """
    path = str(file)
    return {
        "evaluate": ("value = eval('0.25 + 0.25')", ""),
        "import": ("import os, shutil; value = 0.5", ""),
        "exit": ("exit()", "raised"),
        "raise SystemExit": ("raise SystemExit(0)", "raised"),
        "raise KeyboardInterrupt": ("raise KeyboardInterrupt", "raised"),
        "raise our own error": (
            "from dppo_lightning.base.errors import RewardError; raise RewardError('stop the run')",
            "raised",
        ),
        "end the process": ("import os; os._exit(0)", "died"),
        "crash": ("import ctypes; ctypes.string_at(0)", "died"),
        "hang in Python": ("while True: pass", "timeout"),
        "hang and catch": ("while True:\n try:\n  while True: pass\n except BaseException: pass", "timeout"),
        "hang in C": ("9**9**8", "timeout"),
        "hang without signals": ("import signal, time; signal.alarm(0); time.sleep(1000)", "timeout"),
        "allocate 50 GB": ("value = len(bytearray(50 << 30))", "memory"),
        "allocate in steps": ("kept = []\nwhile True: kept.append(bytearray(1 << 24))", "memory"),
        "print 1 GB": ("import os\nfor _ in range(1024): os.write(1, bytes(1 << 20))\nvalue = 0.5", ""),
        "fork": ("import os; [os.fork() for _ in range(3)]; value = 0.5", ""),
        "fork 200 times": ("import os, time\nfor _ in range(200):\n if os.fork() == 0: time.sleep(1000)", "raised"),
        "leave a daemon": (DAEMON.format(file=path), ""),
        "start threads": (
            "import threading\ndef run():\n while True: pass\n"
            "for _ in range(3): threading.Thread(target=run).start()\nvalue = 0.5",
            "",
        ),
        "kill others": (KILL.format(victim=victim), ""),
        "write a file": (f"open({path!r}, 'w').write('x')", "raised"),
        "write in a shell": (f"import os; os.system('echo x > {path}'); value = 0.5", ""),
        "fill the disk": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "raised"),
        "leave files": (
            "import os; os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.chmod('a', 0); value = 0.5",
            "",
        ),
        "find files": ("import os; value = 0.5 if not os.listdir('.') else 1.0", ""),
        "connect": (f"import socket; socket.create_connection(('127.0.0.1', {port}), 1); value = 1.0", "raised"),
        "read the environment": (READ_ENVIRONMENT + "value = value or 0.5", ""),
        "change the scorer": (
            "import tests.helpers.hostile as h, gc\n"
            "h.obey.__code__ = (lambda samples: [1.0 for _ in samples]).__code__\nvalue = 0.5",
            "",
        ),
    }


def obey(samples: Sequence[Sample]) -> list[float]:
    """Run each completion, which says its own score: the worst scorer there can be."""
    scores = []
    for sample in samples:
        names: dict[str, float] = {"value": 0.0}
        exec(sample.completion, names)
        scores.append(names["value"])
    return scores


def fail_at(samples: Sequence[Sample], words: tuple[str, ...] = ("bad",)) -> list[Score]:
    """Fail for completions that hold a word; of others, the length."""
    for sample in samples:
        if any(word in sample.completion for word in words):
            raise ValueError(sample.completion)
    return [Score(float(len(sample.completion)), {"letters": 1.0}) for sample in samples]


def surroundings(samples: Sequence[Sample]) -> list[Score]:
    """What a reward finds of its surroundings, as numbers."""
    environment = Path("/proc/self/environ").read_bytes() if os.access("/proc/self/environ", os.R_OK) else b""
    parts = {
        "secret": float(SECRET in os.environ or SECRET.encode() in environment),
        "hash": float(hash("text") % 1000),
        "heavy": float(bool({"torch", "transformers", "lightning", "vllm"} & sys.modules.keys())),
        "threads": float(threading.active_count()),
        "variables": float(len(os.environ)),
    }
    return [Score(0.0, parts) for _ in samples]


def length_twice(samples: Sequence[Sample]) -> list[float]:
    return [float(len(sample.completion)) for sample in samples] * 2


def not_a_number(samples: Sequence[Sample]) -> list[float]:
    return [float("nan") for _ in samples]


def rank_of(samples: Sequence[Sample]) -> list[float]:
    """Score completions by their length among those of their group."""
    if any("bad" in sample.completion for sample in samples):
        raise ValueError("bad")
    lengths = sorted(len(sample.completion) for sample in samples)
    return [float(lengths.index(len(sample.completion))) for sample in samples]


def at_random(samples: Sequence[Sample]) -> list[float]:
    """Score by the global generator, and by the order of a set."""
    return [random.random() + len(sample.completion) + hash(sample.completion) % 97 for sample in samples]
