# SPDX-License-Identifier: Apache-2.0
"""A browser for tests of pages: headless Chromium that notes its console and every request."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "force-device-scale-factor=1",
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A driven Chromium; the test is skipped where there is none."""
    driver = shutil.which("chromedriver")
    if not (CHROMIUM and driver):
        pytest.skip(
            "no chromium with its chromedriver on this machine (Debian: apt-get install chromium "
            "chromium-driver)"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield made
    made.quit()
