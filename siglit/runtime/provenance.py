"""What a measured figure is stamped with: the commit, the software versions and the processor.

Knows nothing of what was measured.
"""

import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).parent.parent.parent


def commit() -> str | None:
    """Short hash of the checkout that holds this package, with + if it has changes; None outside of a checkout."""
    if not (_ROOT / ".git").exists():  # an installation may lie in the repository of another project
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """Model name of the CPU, as precisely as the system states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if len(names) > 0 else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """{distribution: version} of those that are installed."""
    installed = {}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
