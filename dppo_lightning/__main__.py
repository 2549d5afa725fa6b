"""The console script ``dppo``, also ``python -m dppo_lightning``: what must be set before torch loads, then the CLI."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point."""
    # Read once, when torch loads. By default OpenMP's threads spin while they wait: whenever another process wants the
    # cores, the engine among them, that more than doubles the CPU time of a small model's training.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from dppo_lightning.run.cli import main as run

    run()


if __name__ == "__main__":
    main()
