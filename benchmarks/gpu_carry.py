"""Packages that a rented GPU machine lacks, unpacked into one folder and stripped.

    python benchmarks/gpu_carry.py               # writes .site; needs pip and a package index
    PYTHONPATH=$PWD/.site python3 benchmarks/gpu.py

The packages are for Python 3.12 on x86-64 Linux and CUDA 13.0, whatever Python runs this script.
bitsandbytes ships 125 MB of libraries; one for CUDA 13.0 and one for the CPU are kept.
FlashAttention-2 and Unsloth are not carried. FlashAttention-2 is a binary of hundreds of megabytes
for one version of torch; Unsloth pins its own versions of most installed packages.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / ".site"
PACKAGES = {
    "bitsandbytes": "0.50.2",
    "peft": "0.21.0",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "dill": "0.4.1",
    "multiprocess": "0.70.19",
    "tyro": "1.0.17",
    "docstring_parser": "0.18.0",
    "typeguard": "4.6.1",
    "liger_kernel": "0.8.5",
}
"""Versions by import name. tyro needs docstring_parser and typeguard."""
MODULES = [*PACKAGES, "_multiprocess"]
LIBRARIES = {"libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 34)]
MOST_BYTES = 64 * 2**20
"""Limit on everything carried, the program's own files included."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=SITE, help="the folder; replaced")
    options = parser.parse_args()
    make(options.to)
    print(f"{options.to}: {in_mib(size_of(options.to))}, {len(PACKAGES)} packages")


def make(folder: Path) -> None:
    """Install every package without its dependencies, and strip the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        "--target",
        str(folder),
    ]
    command += ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [*command, *(f"{name}=={version}" for name, version in PACKAGES.items())], check=True
    )
    strip(folder)


def strip(folder: Path) -> None:
    """Remove libraries for other devices, compiled files, scripts, and the packages' own tests."""
    for library in folder.glob("bitsandbytes/*.so"):
        if library.name not in LIBRARIES:
            library.unlink()
    useless = [*folder.rglob("__pycache__"), *folder.glob("*/tests"), folder / "bin"]
    for path in useless:
        shutil.rmtree(path, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def in_mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
