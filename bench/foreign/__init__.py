"""Runs on rewards and costs that nobody tuned the defaults for."""
