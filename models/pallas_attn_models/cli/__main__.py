"""``python -m pallas_attn_models.cli``."""

import sys

from pallas_attn_models.cli import main

sys.exit(main())
