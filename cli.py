"""Run the siglit command from a checkout: `python cli.py train -c configs/quickstart.yaml`."""

from siglit.cli import main

if __name__ == "__main__":
    main()
