"""``python -m bench.static_tables``: the tables of bench/README.md."""

import sys

from bench.machine_code.tables import main

if __name__ == "__main__":
    sys.exit(main())
