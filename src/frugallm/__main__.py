"""``python -m frugallm``: the command line."""

from frugallm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
