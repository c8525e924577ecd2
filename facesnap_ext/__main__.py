"""`python -m facesnap_ext` is the command `facesnap`."""

import sys

from facesnap_ext.cli.main import main

sys.exit(main())
