"""Settings of all tests, and the tier that each of them is in.

Unit tests have no marker; ``slow`` ones run ranks as threads, ``multiprocess`` ones as
processes, and ``jobs`` are those of them in tests/jobs.
"""

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

# Test files whose ranks, as threads, take seconds; single tests are marked themselves.
SLOW = {
    "test_averages_saved",
    "test_backward_passes",
    "test_callers",
    "test_checkpoint",
    "test_exchange",
    "test_failures",
    "test_first_basis",
    "test_hard_gradients",
    "test_kept_state",
    "test_lag",
    "test_layouts",
    "test_loading",
    "test_model_wrappers",
    "test_options_on_ranks",
    "test_param_groups",
    "test_parity",
    "test_planned_traffic",
    "test_random_cases",
    "test_replaced_parameters",
    "test_slots",
    "test_teams_on_ranks",
    "test_traffic",
    "test_what_bases_are_made_of",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "jobs: whole jobs, as users start them")
    config.addinivalue_line("markers", "slow: ranks as threads, or plans for many")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
        if item.path.parent.name == "jobs" and item.get_closest_marker("multiprocess"):
            item.add_marker("jobs")
    # The longest first: what is short then fills the last minute of every worker.
    marks = ("jobs", "multiprocess", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(m) is None for m in marks])
