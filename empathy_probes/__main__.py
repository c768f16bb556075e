"""`python -m empathy_probes`: the command line where scripts are not on the path."""

import sys

from empathy_probes.cli import main

sys.exit(main())
