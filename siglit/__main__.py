"""`python -m siglit`."""

from siglit.cli import main

if __name__ == "__main__":
    main()
