"""Runs `pytest bench` in one process, as workers side by side would disturb its times."""


def pytest_xdist_auto_num_workers(config) -> int:
    """Returns 0 workers for `-n auto`, which pyproject.toml asks for."""
    return 0
