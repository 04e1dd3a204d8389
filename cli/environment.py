"""What `rpq env` knows: versions, processors, and whether torchvision fits torch."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = ("rpq-convert", "torch", "transformers", "safetensors", "numba")
BROKEN = (
    "broken: a CUDA build beside a CPU-only torch. rpq-convert works around it in its own commands; to fix it everywhere, "
    "install the build that fits: pip install --force-reinstall --no-deps torchvision --index-url "
    "https://download.pytorch.org/whl/cpu, or uninstall it"
)


def versions() -> dict[str, str]:
    """Return name -> version, without importing anything."""
    return {"python": platform.python_version()} | {package: installed(package) for package in PACKAGES}


def facts() -> dict[str, str | int]:
    """Return name -> value, in the order to print."""
    from rpq_convert import kernels

    found: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform(), **versions()}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return found | {"cpus": cpus, "kernels": kernels.described(), "torchvision": torchvision()}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def torchvision() -> str:
    """Import torchvision in a process of its own, where a failure leaves nothing half imported, and say what to do."""
    if find_spec("torchvision") is None:
        return "not installed, not needed"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, errors="replace", timeout=120
        )
    except subprocess.TimeoutExpired:
        return f"{installed('torchvision')}, its import did not end within 120 s"
    if tried.returncode == 0:
        return f"{installed('torchvision')}, works"
    if "torchvision::nms does not exist" in tried.stderr:
        return f"{installed('torchvision')}, {BROKEN}"
    last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{installed('torchvision')}, its import fails: {last}; reinstall it with the build that fits torch"
