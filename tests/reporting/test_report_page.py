"""The report in a real browser: nothing fails, overflows or stays empty, and the keyboard is enough."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.reporting.html_report import render
from olmoe_train.reporting.run_data import RunReader
from olmoe_train.reporting.serve import make_server
from tests.support.browser import Watched, chromium
from tests.support.report_runs import rich_records, write_records, write_rich_run
from tests.support.task_records import task_values

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as process:
        yield process


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of a report of one run, and of two runs."""
    home = tmp_path_factory.mktemp("reports")
    readers = [RunReader(write_rich_run(home / f"run_{seed}", seed=seed)) for seed in range(2)]
    for reader in readers:
        reader.update()
    paths = {1: home / "one.html", 2: home / "two.html"}
    paths[1].write_text(render(readers[:1]))
    paths[2].write_text(render(readers))
    return paths


def reset_button(page: Any, chart: str) -> Any:
    """The button that is there while a chart is zoomed."""
    return page.locator(f"{chart} button", has_text="Reset zoom")


@pytest.mark.parametrize(
    ("runs", "width", "scheme"),
    [(1, 1400, "light"), (2, 1400, "dark"), (2, 390, "light"), (1, 390, "dark")],
)
def test_it_opens_without_errors_overflow_or_empty_charts(
    browser: Any, reports: dict[int, Path], runs: int, width: int, scheme: str
) -> None:
    watched = Watched(browser, width, scheme)
    watched.open(reports[runs])
    page = watched.page
    assert page.title().endswith("training report")  # no text of the run became markup
    assert page.locator("figure canvas").count() >= 15
    assert page.locator(".health").count() == runs
    # Both tasks of the last evaluation, step 60, with a column of scores per run.
    rows = [row.inner_text().split("\t") for row in page.locator("#panel-tasks tr").all()]
    assert [len(row) for row in rows] == [4 + runs] * 3
    assert all("step 60" in text for text in rows[0][2:-2])
    assert rows[1][2:-2] == ["0.600 ± 0.020"] * runs
    assert [*rows[2][:2], rows[2][-1]] == ["gsm.v1", "bits_per_byte", "1,319"]
    seen = "[getComputedStyle(document.body).backgroundColor, ...['.plot canvas', '.heat'].map(name => "
    seen += "document.querySelector(name).toDataURL())]"
    before = page.evaluate(seen)
    page.click("#theme")
    page.wait_for_timeout(50)
    after = page.evaluate(seen)
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, True, True]
    page.evaluate("document.querySelectorAll('details.behind').forEach(details => details.open = true)")
    # Tables are filled when they are opened; one that stays empty is a timeout here.
    page.wait_for_function(
        "!document.querySelector('details.behind:not(:has(tbody tr)):not(:has(dl))')", timeout=9000
    )
    watched.check()
    page.close()


def test_keyboard_mouse_and_axes(browser: Any, reports: dict[int, Path]) -> None:
    watched = Watched(browser, 1400, "light")
    watched.open(reports[1])
    page = watched.page

    def pixels(selector: str) -> str:
        return str(page.locator(selector).first.evaluate("canvas => canvas.toDataURL()"))

    # The slider shows another step of the loads.
    heat = "#chart-expert-load canvas.heat"
    step, before = page.locator("output").inner_text(), pixels(heat)
    page.focus("#load-step")
    page.keyboard.press("ArrowLeft")
    assert int(page.locator("output").inner_text()) == int(step) - 1
    assert pixels(heat) != before
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    # The cells of a heat map are read by the arrow keys, and Enter chooses a layer.
    page.focus(heat)
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert "layer 2, expert 1" in page.locator("#chart-expert-load .said").first.inner_text()
    assert page.locator("#load-layer").input_value() == "2"
    # A line is switched off by its button.
    curve = "#chart-loss canvas"
    before = pixels(curve)
    page.focus("#chart-loss .legend button")
    page.keyboard.press("Enter")
    assert page.locator("#chart-loss .legend button").first.get_attribute("aria-pressed") == "false"
    assert pixels(curve) != before
    # Dragging zooms, in all charts; a double click shows everything again.
    page.locator("#chart-loss .u-over").scroll_into_view_if_needed()
    box = page.locator("#chart-loss .u-over").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 250, box["y"] + 60, steps=4)
    page.mouse.up()
    for chart in ("#chart-loss", "[id='chart-train/lr']"):
        reset_button(page, chart).wait_for()
    page.mouse.dblclick(box["x"] + 150, box["y"] + 50)
    reset_button(page, "#chart-loss").wait_for(state="hidden")
    page.focus("#chart-loss .plot")
    page.keyboard.press("+")
    reset_button(page, "#chart-loss").wait_for()
    page.keyboard.press("0")
    reset_button(page, "#chart-loss").wait_for(state="hidden")
    # The pointer reads values.
    page.mouse.move(box["x"] + 200, box["y"] + 40)
    page.locator(".tooltip", has_text="validation").wait_for()
    for axis in ("tokens", "time"):
        before = pixels(curve)
        page.get_by_role("button", name=axis, exact=True).click()
        assert pixels(curve) != before
    watched.check()
    page.close()


def test_a_score_of_guessing_is_marked(browser: Any, tmp_path: Path) -> None:
    marks = {0.28: True, 0.3: False}  # two standard errors above guessing are 0.29
    readers = []
    for score in marks:
        record = {"step": 5, "tokens": 640, "time": 1.7e9, "train/loss": 3.0} | task_values(score)
        readers.append(RunReader(write_records(tmp_path / f"{score}", [record])))
        readers[-1].update()
    (tmp_path / "two.html").write_text(render(readers))
    watched = Watched(browser, 1400, "light")
    watched.open(tmp_path / "two.html")
    cells = watched.page.locator("#panel-tasks tbody tr").first.locator("td").all()
    assert ["not above chance" in cell.inner_text() for cell in cells[2:-2]] == list(marks.values())
    watched.page.close()


def test_the_live_page_follows_a_run(browser: Any, tmp_path: Path) -> None:
    records = rich_records()
    reader = RunReader(write_records(tmp_path, records[:30]))
    reader.update()
    server = make_server([reader], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        watched = Watched(browser, 1400, "light")
        watched.open(f"http://127.0.0.1:{server.server_port}/")
        page = watched.page
        page.evaluate("window.notReloaded = true")
        page.focus("#load-step")
        page.keyboard.press("Home")
        assert page.locator("#panel-samples").count() == 0
        page.click(".health summary")
        page.focus("#chart-loss .plot")
        page.keyboard.press("+")  # a zoom, which stays
        curve = "document.querySelector('#chart-loss canvas')"
        page.evaluate(f"window.curve = {curve}")
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records[30:]))
        page.wait_for_selector("#panel-samples", timeout=15_000)
        assert page.evaluate("window.notReloaded")
        assert "step 60" in page.locator(".live").inner_text()
        assert page.locator("#load-step").get_attribute("max") == "59"
        assert page.locator("output").inner_text() == "1"  # where the reader had put it
        assert page.evaluate(f"window.curve === {curve}")
        assert reset_button(page, "#chart-loss").is_visible()
        assert page.locator(".health details[open]").count() == 1
        page.locator("#chart-loss summary").click()
        page.locator("#chart-loss td", has_text="step 60").first.wait_for()
        assert watched.problems == []
        page.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
