"""The page with what was measured, in a browser: what it shows, on which screens, and that texts stay texts."""

import json
import re

import pytest
import torch
from browser import Browser, needed
from PIL import Image

import diffusion as df
from diffusion.app.report import Filling, Section, frames_of, write_report
from diffusion.errors import ArgumentError
from diffusion.testing import worlds

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><!-- <script> &amp;"
)
LONG = "w" * 300


def frame(*pieces):
    return tuple((text, state) for text, state in pieces)


def filling(prompt, *words):
    start = frame(*[("░", "masked")] * len(words))
    half = frame(*[(word, "new") if n % 2 == 0 else ("░", "masked") for n, word in enumerate(words)])
    whole = frame(*[(word, "old" if n % 2 == 0 else "new") for n, word in enumerate(words)])
    once = frame(*[(word, "new") for word in words])
    return Filling(prompt, (("without circuit", (start, half, whole)), ("with circuit", (start, once))))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (1500, 600), "white").save(folder / "curve.png")
    numbers = ("calls", *(f"column {n}" for n in range(6)))
    sections = [
        Section(
            "One call", cells=[("prompt", "text"), (HOSTILE, LONG), ("two", " spaces  kept\nand lines")], is_text=True
        ),
        Section(
            "Curve", "Words & <b>more</b>", cells=[numbers, ["1.23 [1.00, 1.50]"] * 7], picture=folder / "curve.png"
        ),
    ]
    fillings = [filling("In New", " York", " it", " rains"), filling(HOSTILE, HOSTILE, LONG, " end")]
    path = folder / "report.html"
    write_report(path, title="A <title>", summary="& summary", sections=sections, fillings=fillings)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    needed()
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def text_of(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


def test_the_page_shows_the_last_step_and_asks_for_nothing(browser, page):
    browser.open(page.as_uri())
    assert browser.run("document.title") == "A <title>"
    assert browser.run("document.querySelector('#player').hidden") is False
    assert [text_of(browser, name) for name in ("prompt", "side0", "side1")] == [
        "In New",
        " York it rains",
        " York it rains",
    ]
    assert text_of(browser, "said") == "call 2 of 2"
    assert browser.run("[...document.querySelectorAll('h2')].map(e => e.textContent)") == [
        "One call",
        "Step by step",
        "Curve",
    ]
    assert browser.run("document.querySelector('img').naturalWidth") == 1500
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert re.findall(r" (?:src|href)=\W?(\w+)", without_texts(page.read_text())) == ["data"]


def without_texts(source):
    """Return the page without what is escaped or data."""
    return re.sub(r'<script type="application/json".*?</script>|<td.*?</td>', "", source, flags=re.DOTALL)


def test_steps_are_shown_by_slider_and_play_button_without_a_mouse(browser, page):
    browser.open(page.as_uri())
    reached = []
    for _ in range(4):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.textContent || document.activeElement.id"))
    assert reached == ["Prompt 1", "Prompt 2", "Play", "step"]
    browser.press("ArrowLeft")
    assert [text_of(browser, name) for name in ("side0", "side1")] == [" York░ rains", " York it rains"]
    assert browser.run("[...document.querySelectorAll('#side0 span')].map(e => e.className)") == [
        "new",
        "masked",
        "new",
    ]
    browser.press("Home")
    assert [text_of(browser, name) for name in ("side0", "side1", "said")] == ["░░░", "░░░", "call 0 of 2"]
    browser.run("document.getElementById('play').focus()")
    browser.press(" ")
    assert browser.run("document.getElementById('play').getAttribute('aria-pressed')") == "true"
    assert text_of(browser, "play") == "Pause"
    ended = "new Promise(done => { const look = () => play.textContent === 'Play' ? done(said.textContent)"
    ended += (
        " : setTimeout(look, 20); const play = document.getElementById('play'), said = document.getElementById('said');"
    )
    assert browser.run(ended + " look(); })") == "call 2 of 2"
    browser.run("document.querySelector('[data-prompt=\"1\"]').focus()")
    browser.press(" ")
    assert text_of(browser, "prompt") == HOSTILE
    pressed = "[...document.querySelectorAll('[data-prompt]')].map(e => e.getAttribute('aria-pressed'))"
    assert browser.run(pressed) == ["false", "true"]
    assert browser.errors == []


def test_texts_are_texts(browser, page):
    browser.open(page.as_uri())
    browser.run("document.querySelector('[data-prompt=\"1\"]').click()")
    assert text_of(browser, "side0") == HOSTILE + LONG + " end"
    assert browser.run("document.querySelector('td').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 1
    assert browser.run("document.title") == "A <title>"
    assert browser.run("document.querySelectorAll('b').length") == 0
    assert browser.run("getComputedStyle(document.querySelectorAll('td')[3]).whiteSpace").startswith("pre-wrap")
    assert browser.errors == []
    data = re.search(r'id="fillings">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    assert json.loads(data)[1]["prompt"] == HOSTILE


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_nothing_is_wider_than_the_screen(width, browser, page):
    browser.open(page.as_uri(), width=width)
    browser.run("document.querySelector('[data-prompt=\"1\"]').click()")
    assert browser.run("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5"
    assert browser.run(f"{wide} && getComputedStyle(e).clipPath === 'none' && !e.closest('thead')).length") == 0
    targets = "[...document.querySelectorAll('button')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.run(targets)) >= 44
    columns = browser.run("getComputedStyle(document.querySelector('.sides')).gridTemplateColumns.split(' ').length")
    assert columns == (2 if width > 640 else 1)


@pytest.mark.parametrize("dark", [False, True])
def test_words_are_readable_in_light_and_dark(dark, browser, page):
    browser.open(page.as_uri(), dark=dark)
    browser.run(
        "document.getElementById('step').value = 1; document.getElementById('step').dispatchEvent(new Event('input'))"
    )
    luminance = {}
    for name, selector, part in (
        ("paper", "body", "backgroundColor"), ("ink", "body", "color"), ("soft", ".soft", "color"),
        ("card", ".side", "backgroundColor"), ("new", ".new", "backgroundColor"), ("on new", ".new", "color"),
    ):  # fmt: skip
        colour = browser.run(f"getComputedStyle(document.querySelector('{selector}')).{part}")
        luminance[name] = relative_luminance(colour)
    assert (luminance["paper"] < luminance["ink"]) == dark
    for words, ground, least in (
        ("ink", "paper", 7),
        ("soft", "paper", 4.5),
        ("ink", "card", 7),
        ("soft", "card", 4.5),
    ):
        assert contrast(luminance[words], luminance[ground]) >= least, (words, ground)
    assert contrast(luminance["on new"], luminance["new"]) >= 3


def relative_luminance(colour):
    """Return the luminance of "rgb(r, g, b)" (WCAG 2.1)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    return (max(one, two) + 0.05) / (min(one, two) + 0.05)


class Words:
    def decode(self, ids):
        return "".join("AB"[id] for id in ids)


def test_frames_say_what_every_call_wrote():
    world = worlds.alternating(4)
    options = {"gen_length": 4, "block_length": 4, "num_steps": 2, "temperature": 1.0, "seeds": torch.tensor([1])}
    out = df.generate(world.denoiser(), [[]], record=True, **options)
    mask_id = world.denoiser().spec.mask_id
    frames = frames_of(out, Words(), mask_id)
    assert frames[0] == (("░", "masked"),) * 4
    assert [[state for _, state in one].count("new") for one in frames] == [0, 2, 2]
    assert [[state for _, state in one].count("old") for one in frames] == [0, 0, 2]
    assert "".join(text for text, _ in frames[-1]) == Words().decode(out.generated[0].tolist())
    with pytest.raises(ArgumentError, match="record=True"):
        frames_of(df.generate(world.denoiser(), [[]], **options), Words(), mask_id)


def test_a_page_without_texts_has_no_player(browser, tmp_path):
    write_report(tmp_path / "report.html", title="Nothing")
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.run("document.getElementById('player')") is None
    assert browser.errors == []
