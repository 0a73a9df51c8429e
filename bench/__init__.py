"""Measurements and the data of the shipped heads; nothing in `engine` or `kernels` imports from here."""
