import subprocess
import sys

from tests.simt import build


def pytest_collection_finish(session):
    """Where the emulator's tests will run, its build starts now, behind the tests that come before them."""
    if not session.config.option.collectonly and any(item.path.name == "test_simt.py" for item in session.items):
        command = [sys.executable, "-m", "tests.simt.build"]
        session.simt_build = subprocess.Popen(command, cwd=build.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_sessionfinish(session):
    if hasattr(session, "simt_build"):
        session.simt_build.kill()
        session.simt_build.wait()
