"""The tests: a folder for each package of the engine, and what they share in tests/helpers/."""
