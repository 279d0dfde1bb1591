"""``python -m flex_block_attn doctor``: what this machine has, and what will be used."""

import argparse

from . import doctor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flex_block_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what this machine has, and what will be used")
    parser.parse_args()
    print(doctor.report())


if __name__ == "__main__":
    main()
