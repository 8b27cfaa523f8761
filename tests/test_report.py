"""The report: pages that need no network, with every figure, its data and where it was made; looked at in a browser."""

import base64
import json
import re
import shutil

import nbformat
import pandas as pd
import pytest

from scbert.run.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
MARKUP = "<script>alert(1)</script>"


@pytest.fixture
def report(clone, tmp_path, monkeypatch):
    """A report of two notebooks with one figure, a scoreboard, and links of each kind."""
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path / "runs"))
    (tmp_path / "figures").mkdir(exist_ok=True)
    (tmp_path / "figures" / "FIGURE_MAP.csv").write_text(
        "figure,notebook,panel,what\nFig. 2b,03_one,fig2b,cells by type\n"
    )
    text = "# 03 · One\n\nSee [04](04_two.ipynb), [05](05_none.ipynb), [a page](https://example.org/x) and kelp."
    for name, words in (("03_one", text), ("04_two", "# 04 · Two\n\nBack to [03](03_one.ipynb).")):
        output = nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "Figure"})
        code = 'axes = plot.annotation(adata)\nrun.save_figure(fig, "fig2b", table)'
        cell = nbformat.v4.new_code_cell(code, execution_count=1, outputs=[output])
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(words), cell])
        folder = tmp_path / "runs" / "demo" / name
        folder.mkdir(parents=True)
        record = {"notebook": name, "parameters": {}, "seconds": 300, "peak_memory_mb": 1, "checks": [], "seed": 0}
        record |= {"data": {MARKUP: 64 * "a"}, "versions": {"torch": "2"}, "git_commit": "abc", "profile": "demo"}
        record["figures"] = {"fig2b": 1} if name == "03_one" else {}
        (folder / "record.json").write_text(json.dumps(record | {"warnings": [MARKUP]}))
        nbformat.write(notebook, folder / f"{name}.ipynb")
    folder = tmp_path / "runs" / "demo" / "03_one"
    (folder / "fig2b.png").write_bytes(base64.b64decode(PIXEL))
    (folder / "fig2b.csv").write_text("x\n1\n")
    (tmp_path / "runs" / "demo" / "11_scoreboard").mkdir()
    pd.DataFrame({"metric": [MARKUP], "verdict": ["not run"]}).to_csv(
        tmp_path / "runs" / "demo" / "11_scoreboard" / "scoreboard.csv", index=False
    )
    board = write_report("demo", tmp_path / "report")
    assert board["verdict"].tolist() == ["not run"]
    return tmp_path / "report"


def test_each_figure_stands_beside_its_panel_its_data_and_the_cell_that_made_it(report):
    page = (report / "index.html").read_text()
    assert "<strong>Fig. 2b</strong>: cells by type. By scbert.plot.annotation." in page
    (cell,) = re.findall(r'<a href="03_one.html#(cell-id=\w+)">03, cell 1</a>', page)
    assert f'id="{cell}"' in (report / "03_one.html").read_text()
    assert 'href="figures/03_one/fig2b.csv"' in page
    assert (report / "figures" / "03_one" / "fig2b.csv").read_text() == "x\n1\n"
    assert (report / "figures" / "03_one" / "fig2b.png").exists()


def test_a_figure_that_is_gone_is_missed(report, tmp_path):
    (tmp_path / "runs" / "demo" / "03_one" / "fig2b.png").unlink()
    with pytest.warns(UserWarning, match="03_one lacks the figure fig2b, or the cell that drew it: run it again"):
        write_report("demo", tmp_path / "report")


def test_links_lead_to_pages_of_the_report_or_are_none(report):
    page = (report / "03_one.html").read_text()
    assert '<a href="04_two.html">04</a>' in page
    assert "05_none" not in page and "05, " in page
    assert 'href="https://example.org/x"' in page
    assert '<a href="04_two.html" rel="next">' in page and 'rel="prev"' not in page
    assert 'alt="cells by type"' in page


def test_labels_and_warnings_are_text_on_the_page(report):
    for page in report.glob("*.html"):
        assert MARKUP not in page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in (report / "index.html").read_text()


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, by Playwright."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: make test-browser installs it."
    )
    if CHROMIUM is None:
        pytest.skip("There is no Chromium: apt-get install chromium.")
    flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-sync"]
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_without_network_shows_every_page(report, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    followed, left = set(), [(report / "index.html").as_uri()]
    while left:
        page.goto(left.pop())
        followed.add(page.url)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.alt && image.naturalWidth > 0)")
        links = page.evaluate("[...document.links].map(link => link.href)")
        inside = {link.partition("#")[0] for link in links if link.startswith("file:") and ".html" in link}
        left += sorted(inside - followed - set(left))
    assert {url.rpartition("/")[2] for url in followed} == {"index.html", "03_one.html", "04_two.html"}
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_words_are_found_in_the_notebooks(report, browser):
    page = browser.new_page()
    page.goto((report / "index.html").as_uri())
    page.fill("#words", "KELP")
    link = page.locator("#found a")
    assert link.count() == 1
    assert "kelp" in page.locator("#found").inner_text()
    link.click()
    assert "03_one.html#cell-id=" in page.url
    page.goto((report / "index.html").as_uri())
    page.fill("#words", "nowhere to be found")
    assert page.locator("#found").inner_text() == "Nothing has these words."
    page.close()
