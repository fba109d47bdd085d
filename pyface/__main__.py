"""``python -m pyface`` is the same as ``pyface``."""

from pyface.cli.main import run

if __name__ == "__main__":
    run()
