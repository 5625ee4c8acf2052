"""Run the command line: `python -m pyunlearn`."""

from pyunlearn.cli.main import main

if __name__ == "__main__":
    main()
