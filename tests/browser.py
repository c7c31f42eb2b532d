"""Headless Chromium, for tests that look at pages as people see them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.launch.requirements import require

__all__ = ["HEIGHT", "open_page", "require_browser"]

_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
HEIGHT = 900
_TIMEOUT_SECONDS = 60
_CONSOLE = re.compile(r":CONSOLE.*")


def require_browser() -> str:
    """Return the browser's program; the calling test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    require("chromium", None if found else "no Chromium on the PATH (Debian: chromium-headless-shell)")
    assert found is not None
    return found


def open_page(browser: str, folder: Path, page: Path, width: int, *flags: str) -> tuple[str, list[str]]:
    """Open the page from disk and return what the browser wrote, and the lines of the console.

    `folder` is for what the browser keeps.
    """
    command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{HEIGHT}"]
    # Chromium's sandbox refuses root, which is who runs the tests in most containers.
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    result = subprocess.run(
        [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
    )
    return result.stdout, _CONSOLE.findall(result.stderr)
