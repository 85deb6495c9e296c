"""The command line: `lowrank`, or `python -m lowrank`; one file per command."""

from lowrank.cli.main import main as main
