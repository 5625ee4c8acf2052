"""Run the command line: `python -m pyunlearn`."""

from pyunlearn.cli.main import main

main()
