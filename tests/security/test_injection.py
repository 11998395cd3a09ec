"""Texts of strangers in pages and model cards: a browser runs none of them and asks for nothing.

Each hostile text would change the title of the page, or ask for an address of a server that the test starts.
"""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from acestep_ray.export.card import RunFacts, render_card, write_card
from acestep_ray.reporting.job import report
from acestep_ray.reporting.page import Page
from tests.browser import PROGRAMS
from tests.reporting.conftest import draw, write_run, write_sound  # noqa: F401

TAKEN = "taken"
_SECONDS = 60


def hostile(server: str) -> list[str]:
    """What would run, or ask `server`, where it is taken for HTML, for an attribute, for CSS, SVG or Markdown."""
    script = f"document.title='{TAKEN}';fetch('{server}/script')"
    return [
        f"<script>{script}</script>",
        f"</title></h1><script>{script}</script>",
        f'"><img src=x onerror="{script}">',
        f'\'><svg onload="{script}">',
        f'" onfocus="{script}" autofocus tabindex="1',
        f'</pre></textarea></style><iframe src="javascript:parent.{script}"></iframe>',
        f'<iframe srcdoc="&lt;script&gt;parent.{script}&lt;/script&gt;"></iframe>',
        f'<meta http-equiv="refresh" content="0;url={server}/refresh">',
        f'<link rel="stylesheet" href="{server}/style"><style>@import "{server}/import";</style>',
        f"}}</style><style>body{{background:url({server}/css)}}",
        f'<img src="{server}/image"><audio src="{server}/audio" autoplay></audio><video poster="{server}/poster">',
        f'<object data="{server}/object"></object><embed src="{server}/embed"><base href="{server}/">',
        f'<form action="{server}/form"><button autofocus>x</button></form>',
        f'<svg><image href="{server}/svg"/><use href="{server}/use#x"/><script>{script}</script></svg>',
        f"<!--><script>{script}</script>-->",
        f"<![CDATA[<script>{script}</script>]]>",
        f"&lt;script&gt;{script}&lt;/script&gt;",
        f"\x00<scr\x00ipt>{script}</scr\x00ipt>",
        f"\u2028<script>{script}</script>\u202e",
        f"![x]({server}/markdown) [y](javascript:{script}) <{server}/auto>",
        f"| x |\n\n![x]({server}/row)\n\n<script>{script}</script>\n\n[z]: {server}/reference\n![z]",
        f"`` ` ``</code>![x]({server}/code)`",
        f"---\nlicense: mit\nwidget:\n- src: {server}/front\n---\n",
        f"$\\href{{{server}/tex}}{{x}}$",
    ]


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


def title_in_browser(page: Path, profile: Path) -> str:
    """The title of a page after its scripts had time to run, as a real browser has it."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: {', '.join(PROGRAMS)}")
    command = [
        *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
    found = Title()
    found.feed(done.stdout.decode())
    return found.title


class Title(HTMLParser):
    title = ""
    _inside = False

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "title" and not self.title

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.title += data


class Danger(HTMLParser):
    """Collects what could run or be fetched."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in {"script", "iframe", "object", "embed", "base", "form", "video"} or (
            tag == "meta" and values.get("http-equiv") == "refresh"
        ):
            self.found.append((tag, values))
        for name, value in values.items():
            address = (value or "").strip().lower()
            if name.startswith("on") or (
                name in {"src", "href", "xlink:href", "srcset", "poster", "data", "action"}
                and not address.startswith(("#", "data:"))
            ):
                self.found.append((tag, values))


def dangers(html: str) -> list[tuple[str, dict[str, str | None]]]:
    found = Danger()
    found.feed(html)
    return found.found


def fill_run(run: Path, texts: list[str]) -> None:
    """Put the texts wherever a page of a run takes one."""
    every = " ".join(texts)
    sample = {"key": every, "prompt": every, "lyrics": every, "seed": every, "steps": [every]}
    (run / "samples/step=40/a.json").write_text(json.dumps(sample), encoding="utf-8")
    settings = yaml.safe_load((run / "train.yaml").read_text(encoding="utf-8"))
    settings |= {"exp_name": every, "instrument": every, every: every, "lora_config_path": every}
    (run / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    identity = json.loads((run / "run.json").read_text(encoding="utf-8"))
    identity |= {f"LoRA {every}": every, "LoRA targets": texts}
    (run / "run.json").write_text(json.dumps(identity), encoding="utf-8")
    (run / "mlflow.json").write_text(json.dumps({"tracking_uri": every, "run_id": every}), encoding="utf-8")
    state = run / "checkpoints/step=20/state.json"
    state.write_text(json.dumps({"format": every}), encoding="utf-8")
    for number, text in enumerate(texts):
        name = text.replace("/", "∕").replace("\x00", "")[:60]
        folder = run / f"samples/step={100 + number}"
        folder.mkdir()
        (folder / f"{name}.wav").write_text("no sound")
    write_events(run, texts)


def write_events(run: Path, texts: list[str]) -> None:
    from tests.security.test_pages import events

    logs = run.parent / "logs" / run.name
    content = events(*((1.0, step, f"loss/{text}", 1.0) for text in texts for step in range(3)))
    (logs / "events.out.tfevents.9999999999.x").write_bytes(content)


def test_nothing_of_a_run_runs_in_its_page(server, write_run, tmp_path):  # noqa: F811
    address, asked = server
    run = write_run()
    fill_run(run, hostile(address))
    place = run.rename(run.with_name('"><img src=x onerror=document.title=1>'))
    report(str(place), str(tmp_path / "page.html"))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert dangers(html) == []
    assert address.replace("/", "&#x2F;") in html or address in html, "the texts are shown"
    assert title_in_browser(tmp_path / "page.html", tmp_path / "profile") == place.name
    assert asked == []


def test_nothing_of_a_text_runs_wherever_a_page_takes_one(server, tmp_path, write_sound):  # noqa: F811
    from matplotlib.figure import Figure

    from acestep_ray.drawn_text import literal

    address, asked = server
    texts = hostile(address)
    page = Page(" ".join(texts), " ".join(texts))
    for text in texts:
        page.section(text, text)
        page.table([text], [[text]], caption=text)
        page.facts({text: text})
        page.verbatim(text)
        page.note(text)
        figure = Figure(figsize=(3, 1))
        axes = figure.subplots()
        drawn = "".join(letter for letter in literal(text) if letter.isprintable())
        axes.plot([0, 1], label=drawn)
        axes.set_title(drawn)
        page.figure(figure, text, text)
    page.clip(
        write_sound(tmp_path / "a.wav"), texts[0], text=" ".join(texts), facts=dict.fromkeys(texts, texts)
    )
    page.write(tmp_path / "page.html")
    assert dangers((tmp_path / "page.html").read_text(encoding="utf-8")) == []
    assert title_in_browser(tmp_path / "page.html", tmp_path / "profile") != TAKEN
    assert asked == []


def test_the_canaries_are_alive(server, tmp_path):
    """In a page without our policy and our escapes the same texts run: the tests above would see it."""
    address, asked = server
    (tmp_path / "page.html").write_text("<title>page</title>" + hostile(address)[0] + hostile(address)[10])
    assert title_in_browser(tmp_path / "page.html", tmp_path / "profile") == TAKEN
    assert {"/script", "/image"} <= set(asked)


def facts_of(texts: list[str]) -> RunFacts:
    every = " ".join(texts)
    return RunFacts(
        name=every,
        step=3,
        is_release=None,
        songs={"songs": 1, "hours": 1.0, "languages": dict.fromkeys(texts, 1), "rejects": 0},
        settings={"learning_rate": every, **dict.fromkeys(texts, every)},
        lora=dict.fromkeys(texts, texts),
        losses={"training": {0: 1.0, 1: 0.5}},
    )


def test_nothing_of_a_model_card_runs_or_is_fetched(server, tmp_path):
    """The Hub shows Markdown with HTML; here without the cleaning that the Hub does."""
    address, asked = server
    texts = hostile(address)
    card = render_card(facts_of(texts), "universal", [f"{text}.safetensors" for text in texts])
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"pipeline_tag": "text-to-audio", "tags": ["lora", "music", "ace-step"]}
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert [
        tag for tag in dangers(html) if tag != ("img", {"src": "loss.png", "alt": "Losses by step"})
    ] == []
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == 4
    (tmp_path / "page.html").write_text(f"<meta charset=utf-8><title>card</title>{html}", encoding="utf-8")
    assert title_in_browser(tmp_path / "page.html", tmp_path / "profile") == "card"
    assert asked == []


def test_a_card_with_hostile_names_is_written_with_its_picture(tmp_path):
    write_card(tmp_path, facts_of(hostile("http://127.0.0.1:9")), format_name="peft", files=["a.safetensors"])
    assert (tmp_path / "loss.png").stat().st_size > 1000
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert dangers(MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2]))[1:] == []
