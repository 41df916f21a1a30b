"""A headless Chromium for tests of pages, and what a page must not do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
EMPTY = """canvases => canvases.filter(canvas => {
  const small = Object.assign(document.createElement("canvas"), {width: 160, height: 80});
  const context = small.getContext("2d", {willReadFrequently: true});
  context.fillStyle = "#fff";  // nearly transparent pixels have no exact color
  context.fillRect(0, 0, 160, 80);
  if (canvas.width && canvas.height) context.drawImage(canvas, 0, 0, 160, 80);
  const {data} = context.getImageData(0, 0, 160, 80);
  let painted = 0, colored = 0;
  for (let i = 0; i < data.length; i += 4) {
    const rgb = data.slice(i, i + 3), least = Math.min(...rgb);
    painted += least < 255;
    colored += Math.max(...rgb) - least > 30;
  }
  if (canvas.matches(".heat")) return painted < 0.4 * 160 * 80;
  return canvas.closest(".uplot") ? colored === 0 : painted === 0;
}).map(canvas => canvas.closest("figure, .tile")?.id || canvas.className || "canvas")"""
"""Of a list of canvases, the names of those without cells (heat maps) or without a line (axes are gray)."""


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser process; skips the test where there is none."""
    path = find_browser()
    if path is None:
        pytest.skip(
            "needs a browser: install the package chromium (launch/test.sh does so as root on Debian)"
        )
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page whose errors, console messages and requests are collected."""

    def __init__(self, browser: Any, width: int, scheme: str) -> None:
        height = 844 if width < 600 else 900
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, address: str | Path) -> None:
        self.page.goto(address if isinstance(address, str) else address.resolve().as_uri())
        self.page.wait_for_selector("html[data-ready]")
        self.page.wait_for_timeout(150)  # resize observers have drawn

    def check(self) -> None:
        """No error, no request but for the page, nothing wider than the window, no empty canvas."""
        assert self.problems == []
        assert len(self.requests) == 1
        assert self.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        shown = self.page.evaluate(
            f"({EMPTY})([...document.querySelectorAll('canvas')].filter(c => c.clientWidth))"
        )
        assert shown == []
