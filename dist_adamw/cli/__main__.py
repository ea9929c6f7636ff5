"""``python -m dist_adamw.cli``."""

import sys

from dist_adamw.cli.command import main

sys.exit(main())
