"""The pages for labelling by hand, in a real browser: by keys, by touch, and as it is heard."""

import pytest
import test_hand
from browser import browser
from pages import find_chromium
from test_hand import HOSTILE, desk_of, served
from test_hand_pairs import pair_desk_of

from tppo.labels.words import word_spans
from tppo.sessions.session import Event
from tppo.stages.hand.forms import PairForm, WordForm


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(find_chromium(), tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def server(tmp_path):
    with served(WordForm(desk_of(tmp_path / "hand.jsonl", answers=4), 0.6)) as made:
        yield made


@pytest.fixture
def pairs(tmp_path):
    with served(PairForm(pair_desk_of(tmp_path / "pairs.jsonl", pairs=4))) as made:
        yield made


CODES = {"1": "Digit1", "2": "Digit2", "0": "Digit0", " ": "Space", "Enter": "Enter"}
IDLE = "!busy"


def errors(page):
    """What scripts did not catch, and what the browser refused; not what the server refuses."""
    return [text for text in page.complaints() if "status of 400" not in text]


def press(page, *keys, shift=False):
    for key in keys:
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else None)
        named = {} if text is None else {"text": text}
        for kind in ("keyDown", "keyUp"):
            page.send("Input.dispatchKeyEvent", type=kind, key=key, code=CODES.get(key, key),
                      modifiers=8 if shift else 0, **named)  # fmt: skip
    page.wait(IDLE)


def opened(page, server, **how):
    page.open(server.address, **how)
    page.wait("item && !busy")


def words_of(page):
    return page.run("words")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_somebody_labels_by_keys_alone(server, page, width, dark):
    opened(page, server, width=width, dark=dark)
    keys = 0
    for _ in range(4):
        texts = page.run("item.texts")
        wanted = [int("red" in text) for text in texts]
        press(page, *map(str, wanted))
        assert words_of(page) == wanted
        page.wait("document.activeElement.classList.contains('word')")
        press(page, "Enter")
        keys += len(texts) + 1
    assert keys <= 4 * 8  # a key a word and one an answer
    page.wait("document.getElementById('work').hidden")
    assert [found.label().words for found in server.form.desk.labels]
    for found in server.form.desk.labels:
        spans = word_spans(found.response)
        assert found.words == tuple(int("red" in found.response[a:b]) for a, b in spans)
        assert found.seconds > 0
    press(page, "u")
    page.wait("item && words.every(word => word >= 0)")
    press(page, "Enter")
    page.wait("document.activeElement.id === 'finish'")
    press(page, "Enter")
    page.wait("document.body.innerText.includes('can be closed')")
    server.thread.join(60)
    assert not server.thread.is_alive() and errors(page) == []


def test_keys_walk_turn_and_judge_whole_queries(server, page):
    opened(page, server)
    while page.run("item.texts.length") != 6:
        press(page, "s")
    press(page, "1", shift=True)  # "red shoes"
    page.send("Input.dispatchKeyEvent", type="keyDown", key="1", code="Digit1", text="1",
              autoRepeat=True)  # fmt: skip
    assert words_of(page) == [1, 1, -1, -1, -1, -1]
    press(page, " ", " ")
    assert words_of(page) == [1, 1, 0, -1, -1, -1]
    press(page, "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowUp")
    assert page.run("at") == 0
    press(page, " ", shift=True)
    assert words_of(page) == [0, 0, 0, -1, -1, -1]
    assert page.run("document.getElementById('bad').getAttribute('aria-pressed')") == "true"
    press(page, "a", "Enter")
    (found,) = server.form.desk.labels
    assert (found.words, found.sentence) == ((0, 0, 0, -1, -1, -1), 1)
    press(page, "Enter")
    assert "no word was judged" in page.run("document.getElementById('error').textContent")
    press(page, "?")
    assert not page.run("document.getElementById('help').hidden")
    press(page, "Escape")
    assert page.run("document.getElementById('help').hidden")


def test_a_query_from_right_to_left_is_walked_from_right_to_left(server, page):
    opened(page, server)
    while not page.run("item.texts[0]").startswith("א"):
        press(page, "s")
    press(page, "ArrowLeft")
    assert page.run("at") == 1
    press(page, "ArrowRight")
    assert page.run("at") == 0


SMALL = """[...document.querySelectorAll("button, input, textarea")].filter(
  b => b.offsetHeight > 0 && (b.offsetHeight < 44 || b.offsetWidth < 44)).map(b => b.id)"""
WRAPPED = """[...document.querySelectorAll(".actions button")].filter(
  b => b.offsetHeight > 60).map(b => b.id)"""  # their texts are a line each


def tap(page, element):
    """A finger on an element that JavaScript finds, where it is seen."""
    page.run(f"{element}.scrollIntoView({{block: 'center'}})")
    place = page.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
                     f"({element}.getBoundingClientRect())")
    on_top = f"document.elementFromPoint({place[0]}, {place[1]})"
    assert page.run(f"{element}.contains({on_top})"), f"{element} is hidden by another"
    for kind, points in (("touchStart", [{"x": place[0], "y": place[1]}]), ("touchEnd", [])):
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.wait(IDLE)


def by_id(name):
    return f"document.getElementById('{name}')"


def test_somebody_labels_by_touch(server, page):
    opened(page, server, width=390)
    for _ in range(4):
        count = page.run("words.length")
        for i in range(count):  # a tap: wanted, a second: not wanted
            tap(page, f"buttons[{i}]")
            tap(page, f"buttons[{i}]")
        assert words_of(page) == [0] * count
        tap(page, "buttons[0]")
        assert words_of(page) == [1] + [0] * (count - 1)
        assert page.run("buttons[0].getAttribute('aria-checked')") == "true"
        tap(page, by_id("good"))
        assert page.run(SMALL) == []
        assert not page.run("document.documentElement.scrollWidth > innerWidth")
        tap(page, by_id("next"))
    page.wait("!item")
    assert page.run(SMALL) == []
    found = list(server.form.desk.labels)
    assert len(found) == 4
    assert all(f.words == (1, *[0] * (len(f.words) - 1)) and f.sentence == 1 for f in found)
    tap(page, by_id("back"))
    page.wait("item && words[0] === 1 && whole === 1")
    tap(page, by_id("skip"))
    page.wait("item && words.every(word => word < 0)")
    assert len(list(server.form.desk.labels)) == 3


def test_the_sentence_and_the_name_that_are_typed_are_kept(server, page):
    opened(page, server)
    for field, text in (("guidance", "only shoes"), ("annotator", "anna")):
        page.run(f"{by_id(field)}.select()")
        page.send("Input.insertText", text=text)
        page.run(f"{by_id(field)}.blur()")
        page.wait(f"{IDLE} && item")
    page.run("buttons[0].focus()")
    press(page, "1", "Enter")
    (found,) = server.form.desk.labels
    assert (found.annotator, found.guidance, found.words[0]) == ("anna", "only shoes", 1)


def test_somebody_ends_it_with_fewer_answers_and_by_no_slip(server, page):
    opened(page, server, width=390)
    tap(page, "buttons[0]")
    tap(page, by_id("next"))
    page.wait("words.every(word => word < 0)")
    tap(page, by_id("end"))
    assert "press again" in page.run(f"{by_id('end')}.textContent") and server.thread.is_alive()
    tap(page, by_id("end"))
    page.wait("document.body.innerText.includes('can be closed')")
    server.thread.join(60)
    assert not server.thread.is_alive() and len(list(server.form.desk.labels)) == 1


def heard(page, role=None):
    """What a screen reader is told, as (role, name, states) in the order of the page."""
    found = []
    for node in page.send("Accessibility.getFullAXTree")["nodes"]:
        if node.get("ignored"):
            continue
        states = {p["name"]: p["value"].get("value") for p in node.get("properties", ())}
        name = node.get("name", {}).get("value", "")
        if role is None or node["role"]["value"] == role:
            found.append((node["role"]["value"], name, states))
    return found


def test_a_screen_reader_is_told_what_is_judged(server, page):
    opened(page, server)
    texts = page.run("item.texts")
    words = heard(page, "checkbox")
    assert [name for _, name, _ in words] == [f"{text}, not judged" for text in texts]
    assert {states["checked"] for *_, states in words} == {"mixed"}
    assert words[0][2].get("focused") is True
    press(page, "1", "0")
    words = heard(page, "checkbox")
    assert [name for _, name, _ in words[:2]] == [f"{texts[0]}, wanted", f"{texts[1]}, not wanted"]
    assert [states["checked"] for *_, states in words[:2]] == ["true", "false"]
    press(page, "a")
    whole = {name: states.get("pressed") for _, name, states in heard(page, "button")
             if name in ("wanted", "not wanted")}  # fmt: skip
    assert sorted(whole.values()) == ["false", "true"]
    assert all(name for role, name, _ in heard(page) if role in ("button", "textbox", "checkbox"))
    names = {name for role, name, _ in heard(page) if role in ("region", "group", "list")}
    assert {"history", "answer", "query 1"} <= names
    press(page, "Enter")
    assert page.run("document.getElementById('said').textContent") == "1 of 4 are done."
    assert {"status", "alert"} <= {role for role, *_ in heard(page)}


@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_hostile_texts_are_texts(page, kind, tmp_path, monkeypatch):
    """A megabyte of one query, markup, control characters, an override of the direction."""
    texts = [f"red {HOSTILE}\x00\x1b[2J\nbuy", "y" * 20_000 + "\nred"]
    long = Event("search", "z" * 1_000_000)
    monkeypatch.setattr(test_hand, "MORE", (long,))
    form = (WordForm(desk_of(tmp_path / "a.jsonl", texts, 4), 0.6) if kind == "words"
            else PairForm(pair_desk_of(tmp_path / "a.jsonl", 4, texts)))  # fmt: skip
    with served(form) as server:
        inert(page, server)


def inert(page, server):
    opened(page, server, width=390)
    answer = ""
    for _ in range(4):
        answer += page.run("document.getElementById('judged').innerText")
        press(page, "s")
    assert "img" in answer and "more characters" in answer
    assert "\\u0000" in answer and "\\u001b" in answer
    assert not set(answer) & set("\u202e\0\x1b") and len(answer) < 40_000
    assert not page.run("document.documentElement.scrollWidth > innerWidth")
    assert page.run("document.title").endswith("by hand")
    assert page.run("document.images.length") == 0 and errors(page) == []
    seen = page.run("document.getElementById('history').innerText")
    assert "zzz … (998,008 more characters)" in seen
    assert "<img src=x" in seen and "\\u202e" in seen and "\u202e" not in seen
    own = f"http://127.0.0.1:{server.port}/"
    asked = [address for address in page.asked_for() if address.startswith("http")]
    assert [address for address in asked if address.startswith(own)]
    assert all(address.startswith("http://127.0.0.1:") for address in asked)


# --- pairs


def later(page):
    """Until a key counts: a second press of the same key would be of a pair that nobody read."""
    page.wait(f"item && {IDLE} && performance.now() - since > TOO_SOON_MS")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_somebody_compares_pairs_by_one_key_each(pairs, page, width, dark):
    opened(page, pairs, width=width, dark=dark)
    said = []
    for key in ("1", "ArrowRight", "0", "2"):
        later(page)
        said.append((page.run("item.id"), page.run("item.sides.map(x => x.join(' '))")))
        press(page, key)
    page.wait("!item")
    found = {f.id: f for f in pairs.form.desk.labels}
    wanted = [sides[i] if i is not None else None
              for (_, sides), i in zip(said, (0, 1, None, 1), strict=True)]  # fmt: skip
    kept = [None if found[id].better is None else found[id].responses[found[id].better]
            for id, _ in said]  # fmt: skip
    assert [None if text is None else " ".join(text.split()) for text in kept] == wanted
    assert {f.left for f in found.values()} <= {0, 1}
    press(page, "u")
    page.wait("item")
    assert page.run(f"{by_id('right')}.getAttribute('aria-pressed')") == "true"
    later(page)
    press(page, "1")
    page.wait("!item")
    assert len(list(pairs.form.desk.labels)) == 4
    last = pairs.form.desk.labels.get("me", said[-1][0])
    assert last.better == last.left
    press(page, "Enter")
    page.wait("document.body.innerText.includes('can be closed')")
    pairs.thread.join(60)
    assert not pairs.thread.is_alive() and errors(page) == []


def test_a_key_that_is_held_or_pressed_twice_judges_one_pair(pairs, page):
    opened(page, pairs)
    later(page)
    press(page, "1")
    page.send("Input.dispatchKeyEvent", type="keyDown", key="1", code="Digit1", text="1")
    page.wait(IDLE)
    later(page)
    page.send("Input.dispatchKeyEvent", type="keyDown", key="1", code="Digit1", text="1",
              autoRepeat=True)  # fmt: skip
    page.wait(IDLE)
    assert len(list(pairs.form.desk.labels)) == 1


def test_somebody_compares_pairs_by_touch_and_is_told_what_is_there(pairs, page):
    opened(page, pairs, width=390)
    assert page.run(SMALL) == [] and page.run(WRAPPED) == []
    assert not page.run("document.documentElement.scrollWidth > innerWidth")
    assert {"answer 1", "answer 2", "history"} <= {name for _, name, _ in heard(page, "region")}
    for side in ("right", "equal", "left"):
        later(page)
        assert "pressed" not in "".join(
            str(s.get("pressed")) for _, n, s in heard(page, "button") if "better" in n)
        tap(page, by_id(side))
    later(page)
    assert page.run("document.getElementById('said').textContent") == "3 of 4 are done."
    kept = [f.better if f.better is None else f.better == f.left for f in pairs.form.desk.labels]
    assert kept == [False, None, True]
