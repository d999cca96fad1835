"""``python -m bench.semantics``."""

import sys

from bench.semantics.run import main

sys.exit(main())
