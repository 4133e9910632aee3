"""The pages of `maelstream report` in a headless browser; screenshots are written to tests/artefacts/."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.run_folder.folder import RunFolder
from tests.helpers.reported import make_run

ARTEFACTS = Path(__file__).parents[1] / "artefacts"
PHONE, DESK = {"width": 375, "height": 740}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, names)), driver.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip(f"no browser is installed: none of {', '.join(names)}, nor playwright's own")
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Visit:
    """An open page with its requests and its console messages."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int], scheme: str = "light") -> None:
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.chart .curve').length > 0")

    def screenshot(self, name: str) -> None:
        """Saves a screenshot of the whole page."""
        ARTEFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=str(ARTEFACTS / name), full_page=True)


@pytest.fixture(scope="module")
def reported(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = make_run(tmp_path_factory.mktemp("page") / "one", tiny)
    assert run("report", [str(folder.path)]) == 0
    return folder


@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone"])
def test_a_page_opens_without_errors_loads_nothing_and_fits_the_screen(
    browser: Any, reported: RunFolder, viewport: dict[str, int], scheme: str
) -> None:
    path = reported.path / "report.html"
    visit = Visit(browser, path, viewport, scheme)
    visit.screenshot(f"report-{viewport['width']}-{scheme}.png")
    assert visit.console == []
    assert [address for address in visit.requests if not address.startswith("data:")] == [path.as_uri()]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert visit.page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, background[4:-1].split(","))) < 150 if scheme == "dark" else background.startswith("rgb(25")


def test_nothing_is_cut_at_390_pixels(browser: Any, tiny: str, tmp_path: Path) -> None:
    """A run with two starts, and with long names without a space in them."""
    folder = make_run(tmp_path / "run", tiny)
    (start,) = json.loads(folder.environment.read_text())
    start |= {"host": "node" * 20, "command": f"maelstream pretrain {'x' * 150}.yaml"}
    folder.environment.write_text(json.dumps([start, start]))
    assert run("report", [str(folder.path)]) == 0
    visit = Visit(browser, folder.path / "report.html", {"width": 390, "height": 800})
    visit.screenshot("report-390.png")
    cut = """nodes => nodes.filter(n => n.scrollWidth > n.clientWidth || n.getBoundingClientRect().right > 390)
                           .map(n => n.outerHTML.slice(0, 200))"""
    assert visit.page.eval_on_selector_all("nav a, nav > div, #environment .table, #environment td", cut) == []
    assert visit.page.locator(".starts td").nth(1).evaluate("n => getComputedStyle(n, '::before').content") != "none"


def test_cards_and_images_are_not_cut_by_the_edge_of_a_printed_page(browser: Any, reported: RunFolder) -> None:
    visit = Visit(browser, reported.path / "report.html", DESK)
    visit.page.emulate_media(media="print")
    style = "nodes => [...new Set(nodes.map(n => getComputedStyle(n).{0}))]"
    for selector in (".chart", ".panel", ".images img", ".figures div", "tr"):
        assert visit.page.eval_on_selector_all(selector, style.format("breakInside")) == ["avoid"], selector
    for selector in (".charts", ".series", ".cards"):  # browsers break tracks of a grid
        assert visit.page.eval_on_selector_all(selector, style.format("display")) == ["block"], selector
    assert visit.page.eval_on_selector_all("nav", style.format("display")) == ["none"]
    assert visit.page.eval_on_selector_all(".table, pre", style.format("overflow")) == ["visible"]
    ARTEFACTS.mkdir(exist_ok=True)
    assert len(visit.page.pdf(path=str(ARTEFACTS / "report.pdf"), format="A4")) > 10_000


def test_the_sliders_choose_the_epoch_and_the_ratio_of_the_image(browser: Any, reported: RunFolder) -> None:
    visit = Visit(browser, reported.path / "report.html", DESK)
    panel = visit.page.locator(".images").first
    time, ratio, image = panel.locator("input").first, panel.locator("input").last, panel.locator("img")
    seen = {}
    for epoch in (2, 1, 0):
        for position in (0, 1):
            time.fill(str(epoch))
            ratio.fill(str(position))
            texts = panel.locator("output").all_inner_texts()
            seen[image.get_attribute("src")] = (texts[0], texts[1].partition(",")[0])
    assert list(seen.values()) == [
        (label, removed)
        for label in ("2.4 (step 12)", "1.6 (step 8)", "0.8 (step 4)")
        for removed in ("75 % removed", "85 % removed")
    ]
    time.focus()
    before = image.get_attribute("src")
    visit.page.keyboard.press("ArrowRight")  # the keyboard moves sliders, too
    assert image.get_attribute("src") != before and visit.console == []
    assert image.evaluate("(node) => getComputedStyle(node).imageRendering") == "pixelated"


def test_a_curve_shows_its_value_under_the_pointer(browser: Any, reported: RunFolder) -> None:
    visit = Visit(browser, reported.path / "report.html", DESK)
    chart = visit.page.locator(".chart[data-name=loss]")
    box = chart.locator("svg").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] - 9, box["y"] + 50)
    last = reported.read_metrics()[-1]
    assert chart.locator(".tip").inner_text().split() == ["epoch", "8", f"{last['loss']:.4f}"]
    visit.page.locator("input[value=step]").check()
    visit.page.locator("#log").check()
    visit.page.mouse.move(box["x"] + box["width"] - 9, box["y"] + 51)
    assert chart.locator(".tip").inner_text().split()[:2] == ["step", "40"]
    assert chart.locator(".event").count() == 1  # the skipped step
    visit.page.mouse.move(1, 1)
    assert chart.locator(".tip").count() == 0 and visit.console == []


def test_compared_runs_share_one_chart(browser: Any, reported: RunFolder, tiny: str, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", tiny)
    assert run("report", [str(reported.path), str(other.path), "--out", str(tmp_path / "compare.html")]) == 0
    visit = Visit(browser, tmp_path / "compare.html", DESK)
    visit.screenshot("compare.png")
    chart = visit.page.locator(".chart[data-name=loss]")
    strokes = chart.locator(".curve").evaluate_all("(curves) => curves.map((c) => getComputedStyle(c).stroke)")
    assert len(set(strokes)) == 2 and visit.console == []
    box = chart.locator("svg").bounding_box()
    visit.page.mouse.move(box["x"] + 150, box["y"] + 50)
    assert str(other.path) in chart.locator(".tip").inner_text()
