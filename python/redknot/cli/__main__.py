"""`python -m redknot.cli`."""

import sys

from redknot.cli.main import main

sys.exit(main())
