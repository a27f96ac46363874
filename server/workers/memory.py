"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

CGROUPS = (  # of both versions: the hierarchy's root, the file of the limit, the one of what is in use
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free(device: str, promised: float = 0.0) -> float:
    """Bytes that are free on "cpu" or a CUDA device. On a CPU a container's limit counts; `promised` is the share of
    the GPU that another process will take."""
    if device != "cpu":
        import torch

        left, total = torch.cuda.mem_get_info(device)
        return max(0.0, left - promised * total)
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kibibytes,) = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([1024.0 * kibibytes, *_below_limits(Path("/proc/self/cgroup").read_text())])


def _below_limits(cgroups: str) -> list[float]:
    """What the limits of this process's control groups leave, as /proc/self/cgroup names them ("4:memory:/a/b").

    A container sees its own group as the root, whatever name it has outside.
    """
    found = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        for root, limit, current in CGROUPS if controllers in ("", "memory") else ():
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    found += _left(folder, limit, current)
    return found


def _left(folder: Path, limit: str, current: str) -> list[float]:
    """Bytes that one control group's limit leaves; nothing where it has none."""
    try:
        bound, used = (folder / limit).read_text().strip(), int((folder / current).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []  # this hierarchy is not there
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # which the kernel drops when asked
    return [] if bound == "max" else [max(0.0, float(bound) - used + cache)]
