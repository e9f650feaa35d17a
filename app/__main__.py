"""The command line: `python -m app --help`."""

from app.cli import main

if __name__ == "__main__":
    main()
