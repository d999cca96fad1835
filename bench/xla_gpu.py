"""Fetches the plugin by which XLA compiles for GPUs that are absent: ``python -m bench.xla_gpu``."""

import argparse

from bench.machine_code import xla_gpu


def main(argv: list[str] | None = None) -> int:
    """Installs the wheels of XLA's CUDA plugin into a folder of the user's cache. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.xla_gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--cuda", type=int, choices=xla_gpu.TOOLKITS, default=12, help="major version (default 12)")
    options = parser.parse_args(argv)
    if xla_gpu.missing() is None:
        print(f"already there: {xla_gpu.folder()}")
        return 0
    xla_gpu.fetch(options.cuda)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
