"""Starting several Python processes as one job, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

DEVICES = "--xla_force_host_platform_device_count"
QUICK = "--xla_backend_optimization_level=0"
"""Without LLVM's optimization, a tenth to a third of the tests' time; XLA's own passes stay, fusion too.

XLA_FLAGS=--xla_backend_optimization_level=3 in the environment takes it back.
"""


def command(script: str, *arguments: object) -> list[str]:
    """The command line of a script beside this file."""
    return [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]


def environment(devices: int) -> dict[str, str]:
    """This process's environment with so many CPU devices, and this checkout importable."""
    return os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def xla_flags(devices: int) -> str:
    """XLA_FLAGS with so many CPU devices, and what else the environment asks for."""
    given = os.environ.get("XLA_FLAGS", "").removeprefix(QUICK).split()
    given = [flag for flag in given if not flag.startswith(DEVICES)]
    # Of a flag that stands twice the last counts.
    return " ".join([QUICK, *given, f"{DEVICES}={devices}"])


def free_address() -> str:
    """An address of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_job(
    script: str, *arguments: object, count: int = 2, devices: int = 1
) -> list[subprocess.CompletedProcess]:
    """Run `script *arguments <coordinator> <count> <index>` once for each index, and wait for all."""
    address = free_address()
    running = [
        subprocess.Popen(
            command(script, *arguments, address, count, index),
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(running, outputs, strict=True)
    ]
