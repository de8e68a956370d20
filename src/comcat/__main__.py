"""``python -m comcat``: the same as the ``comcat`` command."""

from comcat.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
