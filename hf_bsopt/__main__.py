"""``python -m hf_bsopt``: the command line. ``python -m hf_bsopt env``: what a bug report needs."""

import sys

from .cli.main import main

sys.exit(main())
