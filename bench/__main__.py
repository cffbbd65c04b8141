"""Entry point of `python -m bench`. Needs no more than acefast itself and, for `plot`, matplotlib."""

import argparse
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    from acefast.errors import InputError
    from bench import deep, epoch, large, ops, plot, search, study

    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of acefast.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in {"ops": ops, "epoch": epoch, "deep": deep, "large": large, "search": search, "study": study, "plot": plot}.items():
        description = module.__doc__.split(": ", 1)[1]
        command = commands.add_parser(name, help=description.splitlines()[0], description=description)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    try:
        return options.main(options, arguments)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
