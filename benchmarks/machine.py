"""What was measured where: the machine in words, and the memory and time of a piece of a program (Linux)."""

from __future__ import annotations

import platform
import re
import resource
import threading
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("keras", "tensorflow", "numpy", "torch", "diffusers", "transformers", "accelerate", "safetensors")
MIB = 2**20


def describe() -> dict[str, object]:
    """Processor, memory, system and the versions of the packages."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    cores = Path("/proc/cpuinfo").read_text().count("processor\t")
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": cores,
        "memory_mib": int(total[1]) // 1024 if total else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


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
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, _cpu_seconds() - self._cpu
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


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
