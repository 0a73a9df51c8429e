"""Fetches the default model on first use and prints its folder: `python -m engine.quickstart`."""

import sys

from engine.errors import UserError
from engine.quickstart import model_folder

if __name__ == "__main__":
    try:
        print(model_folder())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
