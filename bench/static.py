"""``python -m bench.static``: what the machine code of the kernels says."""

import sys

from bench.machine_code.static import main

if __name__ == "__main__":
    sys.exit(main())
