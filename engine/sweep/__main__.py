"""`python -m engine.sweep`."""

from engine.sweep.runs import main

if __name__ == "__main__":
    raise SystemExit(main())
