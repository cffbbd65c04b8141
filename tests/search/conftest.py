import pytest

from acefast.data import synthetic_citation
from acefast.search import resolve_config


@pytest.fixture(scope="session")
def tiny():
    """A graph on which a whole search takes a second."""
    return synthetic_citation(
        80, 30, 3, seed=1, num_edges=160, words=6.0, train_per_class=6, num_val=20, num_test=24, name="tiny"
    )


@pytest.fixture
def tiny_config():
    """Settings of a short search; keyword arguments deviate from it."""

    def make(**settings):
        short = dict(
            dataset="tiny", hidden=8, rounds=2, mask_epochs=4, fix_epochs=4, ace_epochs=2, ace_rounds=3, threads=1,
            seed=3, exchange_edges=0.2, exchange_weights=0.2,
        )  # fmt: skip
        if settings.get("preset") == "released":
            short.pop("exchange_edges")
        return resolve_config(**{**short, **settings})

    return make
