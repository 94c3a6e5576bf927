"""`python -m agentlightning ...`, the same as `agl ...`."""

import sys

from agentlightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
