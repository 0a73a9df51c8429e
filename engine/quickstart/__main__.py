"""Fetches the default model on first use and prints its folder: `python -m engine.quickstart`."""

import sys

from engine.command import run_command
from engine.quickstart import model_folder

if __name__ == "__main__":
    sys.exit(run_command(lambda argv, standing: print(model_folder()), None))
