"""`python -m torchcodec_weights.cli`."""

import sys

from torchcodec_weights.cli import main

sys.exit(main())
