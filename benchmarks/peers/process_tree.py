"""Memory and CPU time of a process with all its descendants, read from /proc."""

import os
from pathlib import Path

from common import Quiet


class Tree:
    """A process and its descendants, as they are whenever something is asked."""

    def __init__(self, root: int):
        self._root = root
        self.watch()

    def watch(self) -> None:
        """Count the CPU time of others from now on."""
        self._quiet = Quiet(self)

    def share_of_others(self) -> float:
        """CPU time of other processes since `watch`, as a share of all cores' time."""
        return self._quiet.share_of_others()

    def cpu_s(self) -> float:
        """CPU seconds that the processes have used."""
        ticks = (sum(map(int, stat[11:13])) for stat in self._stats().values())
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def peak_memory_bytes(self) -> int:
        """Sum of the most that each process has held; what processes share counts in each."""
        total = 0
        for pid in self._stats():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return total

    def _stats(self) -> dict[int, list[str]]:
        """Fields of `stat` after the name, of every process of the tree."""
        stats: dict[int, list[str]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    stats[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):  # the process has ended
                    continue
        inside = {self._root}
        while grown := {pid for pid, stat in stats.items() if int(stat[1]) in inside} - inside:
            inside |= grown
        return {pid: stats[pid] for pid in inside}
