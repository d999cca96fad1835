"""``python -m bench.static``: the machine-code report of the kernels."""

import sys

from bench.machine_code.static import main

if __name__ == "__main__":
    sys.exit(main())
