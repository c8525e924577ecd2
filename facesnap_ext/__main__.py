"""`python -m facesnap_ext` is the command `facesnap`."""

import sys

from facesnap_ext.cli import main

sys.exit(main())
