"""Takes pictures of a report for the documentation, with playwright and the chromium of the system.

    python benchmarks/screenshot_report.py report.html docs/images/report.webp [--select CSS] [--height 900]
        [--width 1400] [--dark] [--until-step N]

The picture is a WebP file of the top of the page, or of the first element that --select names. --until-step
moves the slider of the experts' loads.
"""

import argparse
import base64
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

QUALITY = 0.7
AS_WEBP = """async ([png, quality]) => {
  const image = new Image();
  image.src = "data:image/png;base64," + png;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/webp", quality).split(",")[1];
}"""
"""The browser encodes the picture, so that no library of pictures is needed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--select", help="CSS selector of the element to show; without it, the top of the page"
    )
    parser.add_argument("--width", type=int, default=1400, help="of the window, in CSS pixels")
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--until-step", type=int)
    options = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.goto(options.report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        if options.until_step is not None:
            page.evaluate("step => app.parts.get('loads').seek(step)", options.until_step)
        page.wait_for_timeout(500)
        picture = page.locator(options.select).first.screenshot() if options.select else page.screenshot()
        png = base64.b64encode(picture).decode()
        options.out.write_bytes(base64.b64decode(browser.new_page().evaluate(AS_WEBP, [png, QUALITY])))
        browser.close()
    print(f"{options.out}  {options.out.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
