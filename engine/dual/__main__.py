"""`python -m engine.dual SCORES --threshold B`."""

from engine.dual.analysis import main

if __name__ == "__main__":
    raise SystemExit(main())
