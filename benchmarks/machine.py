"""What a measurement was taken on, and with what: without it a figure says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("tensorflow", "keras", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # of a processor, that decide its kernels


def describe() -> dict[str, Any]:
    """Processor, memory, versions and load at this moment, as JSON holds them."""
    processor = _fields("/proc/cpuinfo")
    flags = processor.get("flags", "").split()
    memory = _fields("/proc/meminfo").get("MemTotal", "0 kB")
    return {
        "processor": processor.get("model name", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "load_average": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a function gives, and the seconds that it took: on the wall, and of all this process' threads together."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = function()
    return result, {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    """User's and system's seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_memory_gib() -> float:
    """The most memory that this process has held so far (VmHWM)."""
    return int(_fields("/proc/self/status")["VmHWM"].split()[0]) / 2**20


def _fields(path: str) -> dict[str, str]:
    """The first value of each name in a file of lines such as `name : value`."""
    found: dict[str, str] = {}
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).is_file() else []
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
