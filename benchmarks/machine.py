"""What a measurement was taken on, and with what: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("tensorflow", "keras", "keras-cv", "numpy", "openvino"),
    *("torch", "diffusers", "transformers", "accelerate", "safetensors"),
)
MIB = 2**20
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # of a processor, that decide its kernels


def describe() -> dict[str, Any]:
    """Processor, memory, versions, this project's revision and load at this moment, as JSON holds them."""
    processor = _fields("/proc/cpuinfo")
    flags = processor.get("flags", "").split()
    memory = _fields("/proc/meminfo").get("MemTotal", "0 kB")
    return {
        "processor": processor.get("model name", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        "revision": _revision(),
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


def memory_mib() -> float:
    """What this process holds now (VmRSS)."""
    return _status()["VmRSS"] / MIB


def available_gib() -> float:
    """Memory that new processes can have (MemAvailable)."""
    return int(_fields("/proc/meminfo")["MemAvailable"].split()[0]) / 2**20


def has_bfloat16(described: dict[str, Any]) -> bool:
    """Whether the machine that `describe` speaks of multiplies bfloat16, and need not emulate it."""
    return bool(described["gpus"] or {"avx512_bf16", "amx_bf16"} & set(described["flags"]))


def gpus() -> list[str]:
    """NVIDIA's, by name."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return said.stdout.splitlines() if said.returncode == 0 else []


def _fields(path: str) -> dict[str, str]:
    """The first value of each name in a file of lines such as `name : value`."""
    found: dict[str, str] = {}
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).is_file() else []
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {distribution.name.lower() for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in found}


def _revision() -> str:
    """This project's commit, with "-dirty" where files differ from it; empty where that is not known."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent)
    return said.stdout.strip()


class Meter:
    """What a block of code takes: `with Meter() as meter: ...`, then `meter.figures`.

    Attributes:
        figures: `wall_s`; `cpu_s`, user and system; `peak_mib`, the largest resident memory less that before the block;
            `peak_anon_mib`, the same of memory that no file backs, seen every two milliseconds; and `held_anon_mib`,
            what of that is there at the end.
    """

    def __enter__(self) -> Meter:
        # From here on the kernel counts the peak anew: imports and what came before do not matter.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status()
        self._peak_anon = self._before["RssAnon"]
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, cpu_seconds() - self._cpu
        self._ended.set()
        self._watcher.join()
        after = _status()
        self.figures = {
            "wall_s": round(wall, 2),
            "cpu_s": round(cpu, 2),
            "peak_mib": round((after["VmHWM"] - self._before["VmRSS"]) / MIB, 1),
            "peak_anon_mib": round((max(self._peak_anon, after["RssAnon"]) - self._before["RssAnon"]) / MIB, 1),
            "held_anon_mib": round((after["RssAnon"] - self._before["RssAnon"]) / MIB, 1),
        }

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._peak_anon = max(self._peak_anon, _status()["RssAnon"])


def _status() -> dict[str, int]:
    """Bytes of resident memory: now, at most, and of that which no file backs."""
    found = re.findall(r"(VmHWM|VmRSS|RssAnon):\s*(\d+) kB", Path("/proc/self/status").read_text())
    return {name: 1024 * int(size) for name, size in found}
