"""The same computations the ways that are in use: `ops` single ops, `search` the trainings of a whole search."""
