"""What this process may use of its machine: cores and memory, within its affinity and its control groups.

A container or a SLURM job gets a part of the machine, but `os.cpu_count` and /proc/meminfo tell of all of it.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def cores() -> int:
    """Cores that this process may run on, at least 1; a quota of part of a core counts as a whole one."""
    # taskset, SLURM and cpuset groups set the affinity; macOS has none.
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([there, *(max(1, math.ceil(quota)) for quota in map(_quota, _groups("cpu")) if quota is not None)])


def cores_per_rank(ranks: int) -> int:
    """Cores for each of the ranks on this machine, at least 1; what SLURM has given to each task is one rank's own."""
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores(), int(own)) if own.isdecimal() and int(own) else max(1, cores() // ranks)


def free_memory() -> int:
    """Bytes that this process can still get, file cache that would be given back included."""
    try:
        there = _fields(_MEMINFO)["MemAvailable:"] * 1024
    except (OSError, KeyError):  # not Linux: what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([there, *(free for free in map(_free_in_group, _groups("memory")) if free is not None)])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, version 2 or 1, each followed by the ones around it."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        group = root / path.lstrip("/")
        # In a container the path may be the one outside of it: only what is there of it counts.
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root) and folder.is_dir())


def _quota(group: Path) -> float | None:
    """Cores' worth of time that a group may use; None: all."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no limit: "max", or no such file
        return None


def _free_in_group(group: Path) -> int | None:
    """Bytes up to a group's limit; None where it has none."""
    version_2 = (group / "memory.max").exists()
    limit, used = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    try:
        left = int((group / limit).read_text(encoding="utf-8")) - int((group / used).read_text(encoding="utf-8"))
        counts = _fields(group / "memory.stat")
    except (OSError, ValueError):  # no limit: "max", or no such file
        return None
    # The group's use counts the files that it has read, and so does a cache that was read once.
    prefix = "" if version_2 else "total_"
    return max(0, left + counts.get(f"{prefix}inactive_file", 0) + counts.get(f"{prefix}active_file", 0))


def _fields(path: Path) -> dict[str, int]:
    """{first word: second} of each line."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text(encoding="utf-8").splitlines()) if words}
