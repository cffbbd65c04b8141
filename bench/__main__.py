"""Entry point of `python -m bench`."""

import sys

import tyro

from bench.ops import OpsBenchmark


def main() -> int:
    return tyro.extras.subcommand_cli_from_dict({"ops": OpsBenchmark}, prog="python -m bench").run()


if __name__ == "__main__":
    sys.exit(main())
