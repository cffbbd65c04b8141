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
