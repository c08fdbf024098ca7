"""`python -m kunserve_sglang.cli`, for where the script `kunserve` is not on the path."""

import sys

from kunserve_sglang.cli.main import main

sys.exit(main())
