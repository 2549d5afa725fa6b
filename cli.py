"""Thin entry: ``python cli.py fit --config recipe.yaml`` is the console script ``dppo``."""

from dppo_lightning.__main__ import main

if __name__ == "__main__":
    main()
