"""Settings of all tests, and which of them a quick look leaves out."""

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure, and a run must be repeatable.
settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("steady")

# Test files whose tests in several processes are whole jobs, or as long as one.
JOBS = {
    "test_deepspeed_examples",
    "test_faults",
    "test_launch",
    "test_resume",
    "test_soak",
    "test_two_hosts",
}
# Test files that take long in one process: many ranks as threads.
SLOW = {
    "test_backward_passes",
    "test_checkpoint",
    "test_failures",
    "test_layouts",
    "test_options_on_ranks",
    "test_parity",
    "test_random_cases",
    "test_traffic",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "jobs: whole jobs, or tests as long as one")
    config.addinivalue_line("markers", "slow: many ranks as threads")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
        if item.path.stem in JOBS and item.get_closest_marker("multiprocess"):
            item.add_marker("jobs")
    # The longest first: what is short then fills the last minute of every worker.
    marks = ("jobs", "multiprocess", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(m) is None for m in marks])
