"""The page: its files and data, and a person's way through it in a real browser."""

import json
import os
import time
from itertools import combinations

import pytest
import torch
from helpers.browser import Browser, find
from helpers.tiny import make_adapter, make_model
from serving.conftest import ADMIN_KEY, API_KEY, make_library, measured_tasks

import sparselet as sl
from sparselet.adapter import SparseAdapter

MODEL = make_model(initializer_range=0.5)
HOSTILE = '<img src=x onerror="window.broken = 1"><script>window.broken = 1</script> \u202e'


def test_files_need_no_key_and_load_nothing_from_elsewhere(server):
    page = server.get("/", key=None)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("main.js", "page.css"):
        file = server.get(f"/page/{name}", key=None)
        assert file.headers["x-content-type-options"] == "nosniff"
        assert "innerHTML" not in file.text
    for name in ("absent.js", "../app.py", "%2e%2e%2fapp.py", "index.html%00"):
        assert server.get(f"/page/{name}", key=None).status_code == 404
    for path in ("/library", "/library/where?name=one"):
        assert server.get(path, key=None).status_code == 401


def test_cards_say_what_the_files_say(start, tmp_path):
    make_library(tmp_path / "library")
    metrics = {"rougeL": 61.5, "n": 100, "flag": True, "text": "x"}
    make_adapter(MODEL, 4, seed=5, task=HOSTILE, metrics=metrics).save(tmp_path / "library" / "scored")
    make_adapter(make_model(seed=3), seed=1).save(tmp_path / "library" / "other")
    server = start()
    server.admin("merge", name="mix", experts=[{"name": "one"}, {"name": "two", "weight": 0.5}])
    (tmp_path / "library" / "broken").mkdir()
    (tmp_path / "library" / "broken" / "adapter_config.json").write_text("{")
    server = start()
    assert str(tmp_path) not in server.get("/library").text
    library = server.get("/library").json()
    cards = {card["name"]: card for card in library["experts"]}
    assert list(cards) == ["bare", "mix", "one", "scored", "two"]
    assert cards["scored"]["metrics"] == {"rougeL": 61.5, "n": 100}
    assert cards["scored"]["block"] == "tiles of 4×4"
    assert "\u202e" not in cards["scored"]["task"]
    assert (cards["mix"]["method"], cards["mix"]["members"]) == ("overlap", ["first", "0.5 · second"])
    assert cards["one"]["density"] == pytest.approx(0.25, abs=0.01)
    assert [(refused["name"], refused["other_base"]) for refused in library["refused"]] == [("broken", False), ("other", True)]
    assert library["can_route"] is False
    assert {method["name"] for method in library["methods"] if method["needs_profiles"]} == {"regmean"}


def test_where_is_that_of_the_dense_changes(server):
    found = server.get("/library/where?name=one&name=two&name=bare").json()
    dense = {n: {t: d.to_dense() for t, d in SparseAdapter.load(server.library / n).items()} for n in ("one", "two", "bare")}
    for located in found["maps"]:
        changes = dense[located["name"]]
        total = sum(float(change.square().sum()) for change in changes.values())
        for cell in located["cells"]:
            change = changes[cell["target"]]
            assert cell["rms"] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)
            assert cell["share"] == pytest.approx(float(change.square().sum()) / total, rel=1e-5)
            assert cell["target"].endswith(f"{cell['layer']}.self_attn.{cell['projection']}")
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == list(combinations(("one", "two", "bare"), 2))
    for pair in found["pairs"]:
        a, b = (torch.cat([dense[pair[side]][t].flatten() for t in sorted(dense["one"])]) for side in ("first", "second"))
        both, either = (a != 0) & (b != 0), (a != 0) | (b != 0)
        assert pair["overlap"] == pytest.approx(float(both.sum() / either.sum()))
        assert pair["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-4)
    assert server.get("/library/where?name=one").json()["pairs"] == []
    assert server.get("/library/where?name=absent").status_code == 404
    assert server.get("/library/where?" + "&".join(["name=one"] * 17)).status_code == 400
    assert server.get("/library/where").status_code == 400


@pytest.mark.parametrize("who", ["one", "bare", "merge"])
def test_scores_are_those_of_evaluate(server, served_model, who):
    named = {"experts": [{"name": "one"}, {"name": "two"}], "method": "uniform"} if who == "merge" else {"model": who}
    sources = [SparseAdapter.load(server.library / name) for name in ("one", "two", "bare")]
    adapter = {"one": sources[0], "bare": sources[2], "merge": sl.merge(sources[:2], "uniform")}[who]
    measured = server.post("/library/measure", {**named, "task": "second", "rows": 5}).json()
    settings = sl.EvalSettings(split="validation", rows=5, chat_template=who != "bare")
    (expected,) = sl.evaluate(adapter, measured_tasks(served_model)[1], model=served_model, settings=settings).results.values()
    assert measured["mean"] == pytest.approx(expected[0].scores["rougeL"])
    assert (measured["task"], measured["rows"]) == ("second", 5)
    assert 0 < measured["low"] <= measured["mean"] <= measured["high"]


def test_what_cannot_be_measured_is_refused_by_field(server):
    assert server.get("/library").json()["tasks"] == ["first", "second"]
    for body, field in (({"task": "third"}, "task"), ({"task": "first", "rows": 0}, "rows")):
        answer = server.post("/library/measure", {"model": "one", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert server.post("/library/measure", {"model": "absent", "task": "first"}).status_code == 404
    assert server.post("/library/measure", {"model": "one", "task": "first"}, key=None).status_code == 401


# In a real browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find()
    if program is None:
        pytest.skip("there is no Chromium here; put one on the path, or set CHROMIUM")
    started = Browser(program, tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


class Visitor:
    """A person with a browser at a server."""

    def __init__(self, browser, server, width=1280, dark=False):
        self.browser = browser
        browser.open(f"{server.url}/", width, dark=dark)
        self.type("api-key", API_KEY, "change")
        self.wait_for("document.querySelectorAll('.card').length")

    def evaluate(self, expression):
        return self.browser.evaluate(expression)

    def wait_for(self, expression):
        deadline = time.monotonic() + 60
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def click(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, identifier, text, *events):
        field = f"document.getElementById({json.dumps(identifier)})"
        self.evaluate(f"{field}.value = {json.dumps(text)}")
        for event in events or ("input",):
            self.evaluate(f"{field}.dispatchEvent(new Event('{event}', {{bubbles: true}}))")

    def text(self, selector):
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def see(self, view):
        """Open a view; nothing of it is beyond the window's sides."""
        self.click(f"#tab-{view}")
        assert self.evaluate(f"!document.getElementById('{view}').hidden")
        if view == "where":
            self.wait_for("document.querySelector('.pairs td') !== null")
        if os.environ.get("PICTURES"):
            self.browser.picture(f"{os.environ['PICTURES']}-{view}.png")
        assert self.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def complaints(self):
        """Errors and warnings in the console, without that of the first request, which has no key."""
        texts = [event["params"] for event in self.browser.events if event["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in self.browser.events if e["method"] == "Log.entryAdded"]
        return texts + [e["text"] for e in entries if e["level"] in ("error", "warning") and "401" not in e["text"]]


def test_a_person_chooses_looks_merges_asks_and_saves(start, browser, tmp_path):
    make_library(tmp_path / "library")
    make_adapter(MODEL, seed=6, task=HOSTILE).save(tmp_path / "library" / "hostile")
    server = start()
    visitor = Visitor(browser, server)
    assert HOSTILE[:40] in visitor.text("#cards")  # as text
    visitor.type("filter", "second")
    assert visitor.evaluate("[...document.querySelectorAll('.card h3')].map(e => e.textContent)") == ["two"]
    visitor.click("[data-expert=two]")
    visitor.type("filter", "")
    visitor.click("[data-expert=one]")
    assert visitor.evaluate("[...document.querySelectorAll('.chip')].map(e => e.firstChild.textContent)") == ["two", "one"]
    visitor.see("where")
    assert visitor.evaluate("document.querySelectorAll('.heat td').length") == 2 * 6
    visitor.see("merge")
    visitor.evaluate("{ const f = document.getElementById('method'); f.value = 'ties'; f.dispatchEvent(new Event('change')); }")
    visitor.evaluate(
        "{ const f = document.querySelector('.slider input'); f.value = 0.5; f.dispatchEvent(new Event('input')); }"
    )
    visitor.evaluate(
        "{ const f = document.querySelector('#parameters input'); f.value = 0.4; f.dispatchEvent(new Event('input')); }"
    )
    assert visitor.text("#command") == "sparselet merge two one --method ties --weights 0.5 1 --set density=0.4 --out merged"
    visitor.type("rows", "2")
    visitor.click("#measure")
    visitor.wait_for("document.querySelectorAll('#scores tbody tr').length === 4")
    cells = visitor.evaluate("[...document.querySelectorAll('#scores tbody tr')].map(e => e.cells[1].textContent)")
    assert cells == ["one", "merged", "two", "merged"]  # each task's own expert, then the merge
    assert "2 rows" in visitor.text("#scores .number")
    visitor.type("admin-key", ADMIN_KEY, "change")
    path = os.path.realpath(tmp_path / "library" / "two")
    visitor.wait_for(f"document.getElementById('command').textContent.includes({json.dumps(path)})")
    visitor.see("try")
    visitor.type("prompt", "ant?")
    visitor.type("tokens", "12")
    visitor.click("#ask")
    visitor.wait_for("!document.getElementById('ask').disabled")
    answers = visitor.evaluate("[...document.querySelectorAll('.answer')].map(e => [...e.children].map(c => c.textContent))")
    merging = {"experts": [{"name": "two", "weight": 0.5}, {"name": "one"}], "method": "ties", "parameters": {"density": 0.4}}
    requests = {"base": ("base", {}), "two": ("two", {}), "one": ("one", {}), "merge by ties": ("merge", merging)}
    assert [label for label, _, _ in answers] == list(requests)
    for label, text, why in answers:
        model, more = requests[label]
        messages = [{"role": "user", "content": "ant?"}]
        expected = server.client.chat.completions.create(model=model, messages=messages, max_tokens=12, extra_body=more)
        assert text == expected.choices[0].message.content
        assert expected.system_fingerprint[:8] in why
    assert visitor.evaluate("document.querySelectorAll('.answer mark').length") > 0
    assert "hange" in visitor.text("#swaps")
    visitor.see("merge")
    visitor.type("merge-name", "mine")
    visitor.click("#save")
    visitor.wait_for("document.getElementById('saved').textContent.startsWith('Saved')")
    assert "mine" in [model.id for model in server.client.models.list()]
    visitor.see("library")
    visitor.wait_for("document.querySelector('[data-expert=mine]') !== null")
    assert visitor.evaluate("window.broken") is None
    assert visitor.complaints() == []


@pytest.mark.parametrize(("width", "dark"), [(400, True), (640, False), (1600, True)])
def test_views_fit_the_window_in_both_schemes(server, browser, width, dark):
    visitor = Visitor(browser, server, width, dark)
    for name in ("one", "two", "bare"):
        visitor.click(f"[data-expert={name}]")
    for view in ("library", "where", "merge", "try"):
        visitor.see(view)
    background = visitor.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background) < 60) == dark
    assert visitor.complaints() == []


def test_tabs_and_cards_by_keyboard(server, browser):
    visitor = Visitor(browser, server)
    visitor.evaluate("document.getElementById('tab-library').focus()")
    browser.press("ArrowRight")
    assert visitor.evaluate("document.activeElement.id") == "tab-where"
    assert visitor.evaluate("!document.getElementById('where').hidden")
    visitor.click("#tab-library")
    visitor.evaluate("document.querySelector('[data-expert=one]').focus()")
    visitor.click("[data-expert=one]")
    assert visitor.evaluate("document.activeElement.dataset.expert") == "one"  # the cards are drawn again


def test_errors_are_shown(server, browser):
    visitor = Visitor(browser, server)
    visitor.type("api-key", "wrong", "change")
    visitor.wait_for("!document.getElementById('message').hidden")
    assert "Keys" in visitor.text("#message")
    visitor.type("api-key", API_KEY, "change")
    visitor.wait_for("document.getElementById('message').hidden")
    visitor.click("[data-expert=one]")
    visitor.see("try")
    visitor.type("prompt", "x" * 5000)
    visitor.click("#ask")
    visitor.wait_for("document.querySelector('.why.bad') !== null")
    assert "positions" in visitor.text(".why.bad")
