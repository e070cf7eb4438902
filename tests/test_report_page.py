# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The report page of a run, opened in headless Chromium."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from report_runs import SECTIONS, write_run
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from vovnet_d2.report import write_page

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.slow

WIDTHS = (1280, 400)


def find_program(*names: str) -> str:
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail(
            f"This test needs Chromium and its driver, and there is no {names[0]} here: "
            "apt-get install chromium chromium-driver"
        )
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = find_program("chromium", "chromium-browser", "google-chrome")
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(
            "disable-dev-shm-usage",
            "hide-scrollbars",
            f"user-data-dir={tmp_path_factory.mktemp('browser')}",
        ),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(find_program("chromedriver")))
    yield driver
    driver.quit()


def open_page(browser: Chrome, page: Path, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def take_screenshot(browser: Chrome, path: Path) -> Path:
    """Take a screenshot of the whole page instead of the window only."""
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))
    return path


def requested(browser: Chrome) -> list[str]:
    """Return the addresses that were requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.fixture
def page(catalogs: None, tmp_path: Path) -> Path:
    return write_page(write_run(tmp_path))


def test_the_page_loads_no_other_files(browser: Chrome, page: Path) -> None:
    requested(browser)
    open_page(browser, page, WIDTHS[0])
    addresses = requested(browser)
    assert page.as_uri() in addresses
    assert {a for a in addresses if not a.startswith("data:image/jpeg")} == {page.as_uri()}
    assert browser.get_log("browser") == []  # no errors and no violations of the content policy
    # Check that the log would show violations.
    browser.execute_script("new Image().src = 'https://example.org/a.png'")
    assert [entry["level"] for entry in browser.get_log("browser")] == ["SEVERE"]


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_visible(browser: Chrome, page: Path, tmp_path: Path, width: int) -> None:
    open_page(browser, page, width)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('h2, h3')]"
        ".filter(e => e.checkVisibility()).map(e => e.textContent)"
    )
    assert [title for title in SECTIONS if title not in shown] == []
    # Every image and every plot is drawn in a visible size.
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('img, .plot svg')]"
        ".map(e => [e.getBoundingClientRect().width, e.naturalWidth ?? 1])"
    )
    assert len(sizes) > 8
    assert min(size for size, _ in sizes) > 120
    assert min(natural for _, natural in sizes) > 0
    # Elements that are wider than the window have their own scroll bar.
    whole = browser.execute_script("return document.scrollingElement.scrollWidth")
    assert whole <= width
    image = Image.open(take_screenshot(browser, tmp_path / f"{width}.png"))
    assert image.width == width
    assert image.height > 2000


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_in_a_plot_is_cut(browser: Chrome, page: Path, width: int) -> None:
    open_page(browser, page, width)
    cut = browser.execute_script(
        "return [...document.querySelectorAll('.plot text')].filter(text => {"
        "  const t = text.getBoundingClientRect();"
        "  const p = text.closest('svg').getBoundingClientRect();"
        "  return t.left < p.left - 1 || t.right > p.right + 1"
        "    || t.top < p.top - 1 || t.bottom > p.bottom + 1;"
        "}).map(text => text.textContent)"
    )
    assert cut == []
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.plot text')]"
        ".map(text => text.getBoundingClientRect().height)"
    )
    assert min(heights) > 9


def test_dark_pages_have_light_text(browser: Chrome, page: Path) -> None:
    script = (
        "const text = document.querySelector('.plot text');"
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill]"
        ".map(color => color.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    for scheme, darker in (("dark", 0), ("light", 1)):
        open_page(browser, page, WIDTHS[0], scheme)
        background_and_text = [sum(color) for color in browser.execute_script(script)]
        assert background_and_text[darker] < 200
        assert background_and_text[1 - darker] > 600
