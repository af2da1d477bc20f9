"""``python -m every_byte``: the command every-byte."""

import sys

from every_byte.cli import main

if __name__ == "__main__":
    sys.exit(main())
