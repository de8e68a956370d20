"""The page with the slider, in a real browser: numbers move with it, and the command that is copied makes that plan."""

import shutil

import pytest

from comcat.cli import main
from comcat.methods.exploring import explore
from comcat.report.explorer import render_explorer

from .models import pictures, tiny_vit

X = pictures(16, 8)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def way():
    settings = {"pictures": 16, "budget": "macs", "forms": "ranks,units,tokens", "multiple": 4}
    return explore(tiny_vit(depth=3), X, X, points=6, measured=3, **settings)


@pytest.fixture(scope="module")
def page(way, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explore.html"
    text = render_explorer(
        way.to_dict(), model="a <model> & co", command=lambda r: f"comcat compress m --reduce {r:g}", notes=["a note"]
    )
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_the_page_needs_no_network_and_is_small(page):
    text = page.read_text()
    assert "http://www.w3.org/2000/svg" in text and text.count("http") == text.count("http-equiv") + 1
    assert len(text) < 1_500_000 and "a &lt;model&gt; &amp; co" in text and "a note" in text


@pytest.mark.parametrize("width", [1100, 380])
def test_the_slider_moves_the_numbers(browser, page, way, width):
    tab = browser.new_page(viewport={"width": width, "height": 900})
    errors = []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto(page.as_uri())
    slide = tab.locator("#slide")
    slide.focus()
    tab.keyboard.press("Home")
    first, command = tab.locator("#tiles").inner_text(), tab.locator("#command").inner_text()
    assert command == f"comcat compress m --reduce {way.points[0].reduce:g}"
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#command").inner_text() == f"comcat compress m --reduce {way.points[1].reduce:g}"
    tab.keyboard.press("End")
    assert tab.locator("#tiles").inner_text() != first
    assert f"{way.points[-1].parameters / 1e6:.2f} M" in tab.locator("#tiles").inner_text()
    row = tab.locator("#parts tbody tr").last.inner_text()
    keep, full = way.points[-1].parts["blocks.2"]["tokens"]
    assert f"{keep} of {full}" in row
    before = tab.locator("#loss polyline").get_attribute("points")
    tab.locator("#axes input").first.check()
    assert tab.locator("#loss polyline").get_attribute("points") != before
    assert not errors
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tab.close()


def test_the_command_is_copied(browser, page, way):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.locator("#copy").click()
    tab.wait_for_function("document.getElementById('said').textContent !== ''")
    assert tab.locator("#said").inner_text().startswith(("Copied", "Selected"))
    context.close()


def test_from_the_command_line_and_back(tmp_path, capsys):
    """The command that the page shows makes the plan that the page shows."""
    import json
    import re
    import shlex

    out = tmp_path / "way.html"
    common = ["timm:test_vit", "--no-pretrained", "--pictures", "16", "--multiple", "4"]
    status = main(
        [
            "explore",
            *common,
            "--data",
            "digits:train",
            "--points",
            "4",
            "--measured",
            "2",
            "--judged",
            "8",
            "--out",
            str(out),
        ]
    )
    assert status == 0, capsys.readouterr().err
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', out.read_text(), re.S)[1])
    point = data["points"][2]
    words = shlex.split(point["command"])[1:]
    words[words.index("small")] = str(tmp_path / "small")
    assert main([*words, "--no-pretrained", "--no-bench"]) == 0, capsys.readouterr().err
    import comcat

    plan = comcat.load(tmp_path / "small").comcat_record.plan
    for name, entry in plan.sites.items():
        block = ".".join(name.split(".")[:2]).split(":")[0]
        part = name.rpartition(":")[2] if ":" in name else name.rpartition(".")[2]
        assert point["parts"][block][part] == [entry.keep, entry.full]
    assert main(["explore", *common, "--data", "digits:train", "--out", str(out)]) != 0
    assert "overwrite" in capsys.readouterr().err
    assert main(["explore", *common, "--data", "digits:train", "--out", str(tmp_path / "way.txt")]) != 0
