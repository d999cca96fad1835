"""Lists the wheels that peers need on a machine without a network, and downloads them: ``python -m bench.peer_wheels``.

They are for Python 3.12 on Linux, x86-64, beside an installation of JAX and PyTorch, which none of them replaces:

    python -m bench.peer_wheels --to .wheels               # here
    pip install --no-index --no-deps --target SITE .wheels/*.whl && export PYTHONPATH=SITE   # there
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LARGEST = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel, its size, and why it travels."""

    name: str
    version: str
    nbytes: int
    why: str


WHEELS = (
    Wheel("tokamax", "0.0.12", 606_602, "a peer"),
    Wheel("einshape", "1.0", 21_392, "tokamax needs it"),
    Wheel("immutabledict", "4.3.1", 5_000, "tokamax needs it"),
    Wheel("qwix", "0.1.8", 168_088, "tokamax needs it"),
    Wheel("tensorboardx", "2.6.5", 87_510, "tokamax needs it"),
    Wheel("typeguard", "2.13.3", 17_605, "tokamax needs it"),
    Wheel("pydantic", "2.14.4", 494_865, "tokamax needs it"),
    Wheel("pydantic-core", "2.50.5", 2_264_846, "pydantic needs it"),
    Wheel("annotated-types", "0.8.0", 13_427, "pydantic needs it"),
    Wheel("typing-extensions", "4.16.0", 45_571, "pydantic needs this version or a later one"),
    Wheel("typing-inspection", "0.4.5", 14_874, "pydantic needs this version or a later one"),
    Wheel("flax", "0.12.12", 533_938, "our decoder needs 0.12.8 or a later one"),
)


def command(to: Path) -> list[str]:
    """The command line of pip."""
    where = [x for platform in _PLATFORMS for x in ("--platform", platform)]
    python = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    wanted = [f"{wheel.name}=={wheel.version}" for wheel in WHEELS]
    return [sys.executable, "-m", "pip", "download", *python, *where, "--dest", str(to), *wanted]


def main(argv: list[str] | None = None) -> int:
    """Lists the wheels; with ``--to`` also downloads them. Returns 0, or 1 if pip fails."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peer_wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="download them into this folder, by pip")
    options = parser.parse_args(argv)
    for wheel in WHEELS:
        print(f"{wheel.name + ' ' + wheel.version:28} {wheel.nbytes / 2**20:6.2f} MiB  {wheel.why}")
    total = sum(wheel.nbytes for wheel in WHEELS)
    print(f"{'together':28} {total / 2**20:6.2f} MiB of at most {LARGEST / 2**20:.0f}")
    if options.to is None:
        return 0
    options.to.mkdir(parents=True, exist_ok=True)
    return 1 if subprocess.run(command(options.to)).returncode else 0


if __name__ == "__main__":
    raise SystemExit(main())
