"""`python -m nsagen`."""

from nsagen.cli import main

if __name__ == "__main__":
    main()
