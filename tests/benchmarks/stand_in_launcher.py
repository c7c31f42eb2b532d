"""A script in the place of mpirun, which programs find in $MPIRUN: it gets their command line, and starts no ranks."""

from pathlib import Path

__all__ = ["stand_in_launcher"]


def stand_in_launcher(folder: Path, script: str) -> str:
    """Write the script, for sh, into the folder, and return its path."""
    launcher = folder / "mpirun"
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(0o755)
    return str(launcher)
