import os

import pytest

from acefast.ops import backend
from tests.inputs import graphs


@pytest.fixture(params=["torch", "auto"])
def each_backend(request):
    """Runs the test under the reference and under what a user gets; tests/ops/test_backend.py holds that the latter is
    native wherever the libraries were built."""
    with backend.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def zoo():
    return graphs()


NEEDS_GPU = "needs a GPU"  # the one reason for which a test may be skipped under ACEFAST_NO_SKIPS=1


def pytest_sessionfinish(session, exitstatus):
    """Under ACEFAST_NO_SKIPS=1 a skipped test fails the run, unless it says that it needs a GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ACEFAST_NO_SKIPS") != "1" or reporter is None:
        return
    unexpected = [r for r in reporter.stats.get("skipped", []) if NEEDS_GPU not in str(r.longrepr)]
    if unexpected:
        reporter.write_line(f"{len(unexpected)} tests were skipped that must run here, the first: {unexpected[0].longrepr}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
