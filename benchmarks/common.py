"""What all benchmarks share: hardware, versions and commit; interleaved timing; the table and its JSON.

Knows nothing of what is measured. Contenders take turns in one run, and what is compared is the ratio of two times of
the same turn, so that other work on the machine affects both.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import siglit
from siglit.runtime import machine, provenance

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PACKAGES = (
    "torch",
    "triton",
    "lightning",
    "numpy",
    "h5py",
    "timm",
    "transformers",
    "pillow",
    "faiss-cpu",
    "embedding-reader",
    "open_clip_torch",
    "clip-benchmark",
)


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--json", type=Path, help="write the figures here")
    options.add_argument("--threads", type=int, default=machine.cores(), help="torch threads of the main process")
    return options


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON can hold them, without the path of the JSON itself."""
    return {name: value for name, value in vars(args).items() if name != "json"}


def stamp() -> dict[str, Any]:
    """Return hardware, versions, commit and time of the measurement."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": provenance.processor(),
        "cores": machine.cores(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": device,
        "cuda": torch.version.cuda if device else None,
        "cudnn": torch.backends.cudnn.version() if device else None,
        "python": platform.python_version(),
        "versions": {"siglit": siglit.__version__, **provenance.versions(PACKAGES)},
        "commit": provenance.commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Time each contender `repeats` times, in turns whose order changes, after one turn that is not counted.

    Args:
        contenders: what is timed, by name.
        repeats: turns.
        before: called at the beginning of each turn, untimed.

    Returns:
        Seconds by name, one for each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for turn in range(repeats + 1):
        if before is not None:
            before()
        random.Random(turn).shuffle(order)
        for name in order:
            begun = time.perf_counter()
            contenders[name]()
            if turn > 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(upper: list[float], lower: list[float]) -> float:
    """Median over the turns of upper / lower."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that a process can still allocate."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info()[0]
    return machine.free_memory()


def begin_peak(device: str = "cpu") -> tuple[int, str]:
    """Reset the high-water mark; return the bytes held now, and the name of the counter that measures the peak."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), "torch.cuda.max_memory_allocated"
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the warm-up freed would hide later allocations
        _CLEAR.write_text("5", encoding="ascii")
    except (OSError, AttributeError):  # not Linux or not glibc: the mark of the whole process, warm-up included
        return peak_rss(), "ru_maxrss, warm-up included"
    return _status("VmRSS"), "VmHWM"


def peak(device: str = "cpu") -> int:
    """Return the most bytes held since `begin_peak`."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if _STATUS.exists() else peak_rss()


def peak_rss() -> int:
    """Return the most bytes this process ever held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw smooth noise, which a JPEG of quality 90 takes about as many bytes for as for a photograph."""
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def report(title: str, rows: list[tuple[str, str, str]], figures: Mapping[str, Any], path: Path | None) -> None:
    """Print (name, figure, target) as a table with the stamp; write figures and stamp as JSON if a path is given."""
    context = stamp()
    gpu = f", {context['gpu']}" if context["gpu"] else ""
    machine_line = f"{context['cores']} cores of {context['cpu']}{gpu}, load {context['load']}"
    print(f"{title}\n{machine_line}, Python {context['python']}")
    print(", ".join(f"{k} {v}" for k, v in context["versions"].items()) + f"; commit {context['commit'] or 'unknown'}")
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, figure, target in rows:
        print(f"  {name:<{widths[0]}}  {figure:>{widths[1]}}" + (f"  (target: {target})" if target else ""))
    if path is not None:
        path.write_text(json.dumps({"title": title, **context, **figures}, indent=2) + "\n", encoding="utf-8")
