"""UGS (Chen et al., ICML 2021): prune by trained masks, rewind, retrain."""

from acefast.search.stages import imp, retrain


def stages(config) -> list:
    return [("imp", imp), ("retrain", retrain)]
