"""`pytest bench` times one process: without workers side by side."""


def pytest_xdist_auto_num_workers(config) -> int:
    """For `-n auto`, which pyproject.toml asks for."""
    return 0
