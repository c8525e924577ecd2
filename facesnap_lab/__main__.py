"""`python -m facesnap_lab` runs the extension's and the lab's commands, as the `facesnap` script does."""

import sys

from facesnap_lab.cli.main import main

sys.exit(main())
