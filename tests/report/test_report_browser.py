"""The report in a real browser: it opens, sorts, unfolds and fits, on a desk and on a phone."""

import shutil
from itertools import pairwise

import pytest

from rotopo.report.command import report
from tests.report import report_inputs as inputs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report(folder / "report.html", **inputs.everything(folder))
    return (folder / "report.html").as_uri()


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "light"), (390, 844, "dark")], ids=str)
def page(request, browser, address):
    """The opened page; at the end, nothing may have gone wrong in it or left it."""
    width, height, scheme = request.param
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))

    def on_request(sent):
        if sent.url != address and not sent.url.startswith("data:"):
            wrong.append(f"request: {sent.url}")

    page.on("request", on_request)
    page.goto(address)
    yield page
    page.close()
    assert wrong == []


def shown_cells(page, table, column):
    script = "(rows, column) => rows.map(row => row.cells[column].dataset.key ?? null)"
    return (
        page.locator("table.sortable").nth(table).locator("tbody tr").evaluate_all(script, column)
    )


def is_sorted(page, keys, up):
    """Numbers by value, texts by the alphabet, and those without either at the end."""
    there = [key for key in keys if key is not None]
    if keys != there + [None] * (len(keys) - len(there)):
        return False
    try:
        values = [float(key) for key in there]
    except ValueError:
        pairs = list(pairwise(there))
        script = "pairs => pairs.map(([a, b]) => a.localeCompare(b, undefined, {numeric: true}))"
        order = page.evaluate(script, pairs)
        return all(way <= 0 if up else way >= 0 for way in order)
    return values == sorted(values, reverse=not up)


def test_every_header_sorts_and_says_so(page):
    changed = 0
    for table in range(page.locator("table.sortable").count()):
        headers = page.locator("table.sortable").nth(table).locator("th")
        for column in range(headers.count()):
            header = headers.nth(column)
            before = shown_cells(page, table, column)
            header.get_by_role("button").click()
            assert header.get_attribute("aria-sort") == "ascending"
            rising = shown_cells(page, table, column)
            header.get_by_role("button").press("Enter")
            assert header.get_attribute("aria-sort") == "descending"
            falling = shown_cells(page, table, column)
            assert sorted(before, key=str) == sorted(rising, key=str) == sorted(falling, key=str)
            assert is_sorted(page, rising, up=True)
            assert is_sorted(page, falling, up=False)
            if len(set(before) - {None}) > 1:
                assert rising != falling
                changed += 1
            assert page.locator("#said").text_content().endswith("descending.")
        assert page.locator("table.sortable").nth(table).locator("[aria-sort]").count() == 1
    assert changed > 20


def test_everything_unfolds_and_nothing_hangs_over(page):
    for details in page.locator("details").all():
        details.locator("summary").first.click()
        assert details.evaluate("node => node.open")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    beyond = page.evaluate(
        """() => [...document.querySelectorAll('main p, main h2, main h3, main img, main summary,'
            + ' main article, figcaption')]
            .filter(node => !node.closest('.table, pre') &&
                node.getBoundingClientRect().right > innerWidth + 1)
            .map(node => node.outerHTML.slice(0, 80))"""
    )
    assert beyond == []


def test_wide_tables_show_where_they_go_on_and_keep_their_first_column(page):
    frames = page.locator(".frame.wide")
    assert frames.count() > 0
    for frame in frames.all():
        table, first = frame.locator(".table"), frame.locator("tbody td").first
        edges = "n => ['::before', '::after'].map(e => getComputedStyle(n, e).opacity)"
        place = first.evaluate("n => n.getBoundingClientRect().left")
        page.wait_for_timeout(200)  # the edge fades in
        assert frame.evaluate(edges) == ["0", "1"]
        table.evaluate("n => n.scrollTo(n.scrollWidth, 0)")
        page.wait_for_timeout(200)
        assert frame.evaluate(edges) == ["1", "0"]
        assert abs(first.evaluate("n => n.getBoundingClientRect().left") - place) < 1
        assert frame.locator("xpath=following-sibling::p").is_visible()


def test_all_letters_are_sans_serif_but_those_of_code(page):
    script = """() => [...new Set([...document.querySelectorAll('body *')]
        .filter(node => !node.closest('pre')).map(node => getComputedStyle(node).fontFamily))]"""
    (family,) = page.evaluate(script)
    assert family.endswith("sans-serif")


def test_every_picture_is_drawn_and_named(page):
    pictures = page.locator("img")
    assert pictures.count() > 25
    for picture in pictures.all():
        size = picture.evaluate("n => [n.complete, n.naturalWidth, n.clientWidth, n.clientHeight]")
        assert size[0]
        assert min(size[1:]) > 150
        assert picture.get_attribute("alt").strip()


def test_contents_lead_to_their_sections_and_texts_stay_texts(page):
    for link in page.locator("nav a").all():
        link.click()
        heading = page.locator(f"id={link.get_attribute('href')[1:]}")
        assert heading.text_content() == link.text_content()
    assert page.title() == "Alignment report <of> films & critics"
    assert page.locator("main script, main img[onerror]").count() == 0
