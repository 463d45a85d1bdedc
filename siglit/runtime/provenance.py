"""What a figure has to say of itself: the commit, the versions and the processor that it was measured with."""

import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).parent.parent.parent


def commit() -> str | None:
    """Short hash of the checkout that this package lies in, with + if it was changed; None outside of one."""
    if not (_ROOT / ".git").exists():  # an installation may lie in the repository of another project
        return None
    words = ["git", "-C", str(_ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """Name of the CPU, as well as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """{distribution: version} of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
