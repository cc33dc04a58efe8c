"""`python -m bitpalette` is the `quantize` command."""

import sys

from .cli import main

sys.exit(main())
