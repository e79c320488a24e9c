"""`python -m deepseek` is the command line."""

import sys

from deepseek.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
