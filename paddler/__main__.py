"""`python -m paddler` is `paddler`."""

import sys

from paddler.cli import main

if __name__ == "__main__":
    sys.exit(main())
