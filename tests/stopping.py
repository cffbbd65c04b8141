"""Progress callbacks that stop a search."""


class Stop(Exception):
    """The search is to stop here."""


def stop_after(count: int, kind: str):
    """A callback that stops the search at the `count`-th event of this kind."""

    def progress(event):
        nonlocal count
        count -= event["event"] == kind
        if not count:
            raise Stop

    return progress
