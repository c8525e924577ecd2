"""`python -m facesnap_ext` runs the extension's commands."""

import sys

from facesnap_ext.cli.main import main

sys.exit(main())
