import resource

import pytest


@pytest.fixture(autouse=True)
def restored_limits():
    """The command limits this process's memory; the tests after it are not to inherit that."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)
