"""A trained model answers: `tppo.load`, `tppo answer`, and what lies beside an exported model."""

import gzip
import io
import json
import re
import shutil
import sys

import pytest
import torch
from exported import PAID, export, sessions
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import tppo
import tppo_kernels as tk
from tppo.cli import main
from tppo.errors import DataError
from tppo.sessions.prompts import encode_prompt, encode_prompts, prompt_text
from tppo.stages.answering.histories import asked
from tppo.stages.answering.recipe import Recipe, read_recipe
from tppo.stages.artifacts import POLICY, REWARD_MODEL
from tppo.store.yaml_file import write_yaml

HISTORY = ["cheap backpack", "click: backpack review", "red backpack"]
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def model(out):
    return tppo.load(out)


def test_the_prompt_is_the_one_of_training(model):
    for session in sessions()[:5]:
        given = {
            "history": [{"type": e.type, "text": e.text} for e in session.history],
            "profile": list(session.profile),
            "queries": len(session.targets),
        }
        question = asked(given, model.recipe, "x")
        (ids,) = model._prompts([question], [question.queries], 12)
        assert [ids] == encode_prompts(model.tokenizer, [session], 10**6)
        lines = prompt_text(session).splitlines()[:-1]  # as somebody would paste them
        pasted = asked("\n".join(lines), model.recipe, "x")
        assert model._prompts([pasted], [question.queries], 12) == [ids]


def test_log_probs_and_rewards_are_those_of_the_models(out, model):
    """Against transformers' own forward passes, one answer at a time, no prompt shared."""
    policy = AutoModelForCausalLM.from_pretrained(out / POLICY.path)
    classes = AutoModelForTokenClassification.from_pretrained(out / REWARD_MODEL.path)
    found = model.answers([HISTORY, ["boots"]], several=3, seed=3)
    assert len({answer.text for answer in found[0]}) == 3
    for one, history in zip(found, (HISTORY, ["boots"]), strict=True):
        session = asked(history, model.recipe, "x").session
        prompt = encode_prompt(model.tokenizer, prompt_text(session))
        for answer in one:
            assert answer.prompt_tokens == len(prompt)
            ids = [token.id for token in answer.tokens]
            row = torch.tensor([[*prompt, *ids]])
            with torch.no_grad():
                logits = policy(row).logits[0, len(prompt) - 1 : -1].double()
                category = classes(row).logits[:, len(prompt) :]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert expected.std() > 0.5  # weights under which every token counts
            given = torch.tensor([token.logprob for token in answer.tokens]).double()
            torch.testing.assert_close(given, expected, rtol=0, atol=2e-4)
            paid = tk.token_rewards(
                category, torch.ones(1, len(ids), dtype=torch.bool), mode="argmax",
                suggested_length=torch.tensor([PAID.suggested_length(model.recipe.queries)]),
                alpha=2.0, values=PAID.values,
            )  # fmt: skip
            assert [token.category for token in answer.tokens] == paid.category[0].tolist()
            rewards = torch.tensor([token.reward for token in answer.tokens])
            torch.testing.assert_close(rewards, paid.rewards[0], rtol=0, atol=1e-5)
            assert answer.reward == pytest.approx(float(paid.rewards.sum()), abs=1e-4)
            assert answer.logprob == pytest.approx(float(expected.sum()), abs=1e-2)


def test_each_query_has_the_figures_of_its_own_tokens(model):
    seen = 0
    for (answer,) in model.answers([[word] for word in "abcdefgh"], seed=1):
        assert [q.text for q in answer.queries] == [
            line.strip() for line in answer.text.split("\n") if line.strip()
        ]
        if "".join(token.text for token in answer.tokens) != answer.text:
            continue  # two tokens share a character
        groups = [[]]
        for token in answer.tokens:
            groups += [[]] if "\n" in token.text else []
            groups[-1].append(token)
        groups = [_stripped(group) for group in groups]
        seen += len(answer.queries) > 1
        for query, tokens in zip(answer.queries, filter(None, groups), strict=True):
            assert "".join(token.text for token in tokens).strip() == query.text
            assert query.logprob == pytest.approx(sum(t.logprob for t in tokens), abs=1e-9)
            mean = sum(t.logprob for t in tokens) / len(tokens)
            assert query.confidence == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)
            assert query.reward == pytest.approx(sum(t.reward for t in tokens), abs=1e-9)
    assert seen


def _stripped(tokens):
    """Tokens of a line without those at its ends that are white space alone."""
    tokens = list(tokens)
    for end in (0, -1):
        while tokens and not tokens[end].text.strip():
            del tokens[end]
    return tokens


def test_greedy_answers_do_not_depend_on_what_is_answered_beside_them(model):
    several = [HISTORY, ["boots"], ["a much longer search about winter boots and socks"] * 4]
    together = model.answers(several, temperature=0.0)
    alone = [model.answers([one], temperature=0.0)[0] for one in several]
    assert [[a.text for a in one] for one in together] == [[a.text for a in one] for one in alone]
    assert model.answer(HISTORY, temperature=0.0) == [q.text for q in alone[0][0].queries]
    ids = torch.tensor([encode_prompt(
        model.tokenizer, prompt_text(asked(HISTORY, model.recipe, "x").session))])  # fmt: skip
    plain = model.model.generate(ids, do_sample=False, max_new_tokens=12,
                                 suppress_tokens=None)[0, ids.shape[1] :]  # fmt: skip
    assert together[0][0].text == model.tokenizer.decode(plain, skip_special_tokens=True)


def test_a_seed_decides_what_is_drawn_and_more_queries_get_more_room(model):
    one, again = (model.answers([HISTORY], several=2, seed=7)[0] for _ in range(2))
    assert one == again and one != model.answers([HISTORY], several=2, seed=8)[0]
    assert max(len(a.tokens) for a in one) <= 12
    (long,) = model.answers([HISTORY], queries=3 * model.recipe.queries)[0]
    assert len(long.tokens) <= 36
    question = asked(HISTORY, model.recipe, "x")
    (ids,) = model._prompts([question], [5], 12)
    assert model.tokenizer.decode(ids).endswith("next 5:\n")


def test_the_exported_folder_alone_is_enough(out, model, tmp_path):
    shutil.copytree(out / POLICY.path, tmp_path / "alone")
    alone = tppo.load(tmp_path / "alone")
    (found,), (whole,) = alone.answers([HISTORY], seed=2)[0], model.answers([HISTORY], seed=2)[0]
    assert found.text == whole.text and found.logprob == pytest.approx(whole.logprob, abs=1e-6)
    assert found.reward is None and whole.reward is not None
    assert all(token.reward is None for token in found.tokens)
    shutil.copytree(out / REWARD_MODEL.path, tmp_path / "judge")
    judged = tppo.load(tmp_path / "alone", reward_model=tmp_path / "judge")
    assert judged.answers([HISTORY], seed=2)[0][0] == whole


def test_a_chat_template_that_was_saved_with_the_model_is_used(tmp_path):
    model = tppo.load(export(tmp_path / "out", template=TEMPLATE))
    question = asked(["boots"], model.recipe, "x")
    (ids,) = model._prompts([question], [2], 12)
    assert model.tokenizer.decode(ids) == "<user>search: boots\nnext 2:\n<assistant>"


def test_the_newest_round_answers(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(out / "train", tmp_path / "out" / "train-12")
    assert tppo.load(tmp_path / "out").path == tmp_path / "out" / "train-12" / "model"


def test_a_model_of_prompts_as_given_answers_texts_and_chats(tmp_path):
    recipe = Recipe(prompt="as given", max_new_tokens=6, temperature=0.7)
    model = tppo.load(export(tmp_path / "out", recipe, TEMPLATE))
    (ids,) = model._prompts([asked("boots\n", recipe, "x")], [1], 6)
    assert model.tokenizer.decode(ids) == "<s>boots\n"
    chat = [{"role": "user", "content": "boots"}]
    (ids,) = model._prompts([asked(chat, recipe, "x")], [1], 6)
    assert model.tokenizer.decode(ids) == "<user>boots<assistant>"
    assert isinstance(model.answer("boots\n"), list)
    with pytest.raises(DataError, match="queries was 2, expected none"):
        model.answer("boots", queries=2)
    with pytest.raises(DataError, match=r"history 0: prompt was \[\], expected a text, or a chat"):
        model.answer([])


def run_answer(monkeypatch, capsys, *arguments, stdin=b"", tty=False):
    class Input(io.TextIOWrapper):
        def isatty(self):
            return tty

    monkeypatch.setattr(sys, "stdin", Input(io.BytesIO(stdin)))
    main(["answer", *arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_one_command_answers_a_history_of_ones_own(out, model, monkeypatch, capsys):
    shown, _ = run_answer(monkeypatch, capsys, "--out", str(out), *HISTORY, "--temperature", "0")
    assert shown.splitlines() == model.answer(HISTORY, temperature=0.0)


def test_histories_come_from_files_and_from_the_standard_input(out, monkeypatch, capsys, tmp_path):
    rows = [{"id": "u1", "history": HISTORY}, {"history": [{"type": "search", "text": "boots"}]},
            {"messages": [{"role": "user", "content": "boots"}], "id": 7}]  # fmt: skip
    lines = "".join(f"{json.dumps(row)}\n\n" for row in rows).encode()
    with gzip.open(tmp_path / "h.jsonl.gz", "wb") as file:
        file.write(lines)
    text = "\n".join([*HISTORY, "", "", "boots", "", "search: boots"]).encode()
    several = ("--several", "2", "--json", "--batch-size", "4", "--temperature", "0")
    ways = [
        run_answer(monkeypatch, capsys, "--out", str(out), *several, stdin=given)[0]
        for given in (lines, text)
    ]
    path = str(tmp_path / "h.jsonl.gz")
    ways.append(run_answer(monkeypatch, capsys, "--out", str(out), "--data", path, *several)[0])
    found = [[json.loads(line) for line in shown.splitlines()] for shown in ways]
    assert [row["id"] for row in found[2]] == ["u1", "u1", f"{path}: line 3", f"{path}: line 3",
                                               "7", "7"]  # fmt: skip
    assert [row["id"] for row in found[1]][::2] == ["history 1", "history 2", "history 3"]
    assert [row["answer"] for row in found[0]] == [1, 2] * 3
    texts = [[row["text"] for row in rows] for rows in found]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == 2
    assert found[0][0].keys() == {"id", "answer", "text", "queries", "tokens", "finish", "logprob",
                                  "prompt_tokens", "reward"}  # fmt: skip


def test_somebody_types_histories_one_by_one(out, monkeypatch, capsys):
    typed = b"red boots\nclick: boots\n\nsocks\n"
    shown, said = run_answer(monkeypatch, capsys, "--out", str(out), stdin=typed, tty=True)
    assert shown.count("history 1, answer 1:\n") == shown.count("history 2, answer 1:\n") == 1
    assert "a blank line asks" in said


@pytest.mark.parametrize(("arguments", "stdin", "message"), [
    (["a", "--data", "x"], b"", "events and --data were given, expected one"),
    ([], b"", "stdin: empty, expected histories"),
    ([], b'{"history": ["a"]}\n{"history": []}\n', "stdin: line 2: the history is empty"),
    ([], b'{"history": ["a"]}\n{"history": [3]}\n', r"stdin: line 2: history\[0\] was 3"),
    ([], b'{"history": ["a"], "queries": 0}\n', "stdin: line 1: field 'queries': was 0"),
    ([], b'{"story": ["a"]}\n', "stdin: line 1: field 'history': missing"),
    ([], b"{broken\n", "stdin: line 1: not JSON"),
    ([], b"boots \xff\n", "stdin: line 1: not UTF-8"),
    (["--several", "0", "a"], b"", "several"),
    (["--queries", "66", "a"], b"", "leave no room for a prompt in the 256 positions"),
    (["boots " * 400], b"", "session 'the history': its prompt has"),
    (["--reward-model", "{other}", "a"], b"", "a reward model with another tokenizer than"),
])  # fmt: skip
def test_what_is_wrong_is_said(out, monkeypatch, capsys, tmp_path, arguments, stdin, message):
    if "{other}" in arguments:
        shutil.copytree(out / REWARD_MODEL.path, tmp_path / "other")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
        tokenizer.add_tokens(["zebra"])
        tokenizer.save_pretrained(tmp_path / "other")
        arguments = [str(tmp_path / "other") if a == "{other}" else a for a in arguments]
    with pytest.raises(SystemExit) as end:
        run_answer(monkeypatch, capsys, "--out", str(out), *arguments, stdin=stdin)
    text = str(end.value) + capsys.readouterr().err
    assert re.search(message, text), text


def test_weights_of_a_run_that_are_not_its_own_give_no_answer(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    for artifact in (POLICY, REWARD_MODEL):
        weights = tmp_path / "out" / artifact.path / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(DataError, match=f"{artifact.path}/model.safetensors: not the file"):
            tppo.load(tmp_path / "out")
        weights.write_bytes(whole)


def test_a_folder_without_a_model_says_what_to_do(out, tmp_path):
    with pytest.raises(DataError, match="no such folder, expected a run"):
        tppo.load(tmp_path / "none")
    with pytest.raises(DataError, match="no finished train stage .* run `tppo run --out"):
        tppo.load(tmp_path)
    (tmp_path / "sft" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="what SFT has learnt is in .*sft/model meanwhile"):
        tppo.load(tmp_path)
    shutil.copytree(out / POLICY.path, tmp_path / "model")
    (tmp_path / "model" / "tppo.json").write_text('{"queries": 0}')
    with pytest.raises(DataError, match="tppo.json: field 'queries': was 0, expected at least 1"):
        tppo.load(tmp_path / "model")
    (tmp_path / "model" / "tppo.json").unlink()
    with pytest.raises(DataError, match="says how the model was asked in training"):
        tppo.load(tmp_path / "model")


def test_a_finished_run_says_how_its_model_is_asked_and_a_stranger_gets_queries(
    tmp_path, capsys, monkeypatch
):
    settings = {
        "sessions": {"train_users": 40, "heldout_users": 8, "test_users": 8, "transfer_users": 4},
        "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
        "sft": {"max_steps": 2, "eval_every": 2},
        "generate": {"samples": 32, "max_new_tokens": 8},
        "reward_model": {"epochs": 1, "min_auc": 0.0},
        "ppo": {"steps": 1, "batch_size": 8, "minibatch_size": 8, "min_format": 0.0,
                "max_kl": 100.0, "without_signal": True},
        "eval": {"heat_users": 1, "continued": False},
    }  # fmt: skip
    write_yaml(tmp_path / "tiny.yaml", settings)
    out = tmp_path / "a run"
    main(["run", "--config", str(tmp_path / "tiny.yaml"), "--out", str(out)])
    said = capsys.readouterr().err
    for i, name in enumerate(["data", "sft", "generate", "label", "map", "train-rm", "train"], 1):
        assert f"\n{name} ({i} of 9): " in f"\n{said}"
    assert "Sessions come from a generator and are split by user." in said
    assert f"tppo answer --out '{out}' " in said and f"tppo serve --out '{out}' " in said
    recipe = read_recipe(out / POLICY.path)
    assert (recipe.queries, recipe.max_new_tokens, recipe.temperature) == (3, 8, 1.0)
    assert recipe.events == ("search", "click") and recipe.paid.length_alpha == 2.0
    lengths = json.loads((out / "map" / "lengths.json").read_text())
    assert recipe.paid.query_tokens == lengths["median_query_tokens"]
    assert read_recipe(out / "sft" / "model").paid.length_alpha is None
    shown, _ = run_answer(monkeypatch, capsys, "--out", str(out), "red shoes", "--json")
    assert all(type(t["reward"]) is float for t in json.loads(shown)["tokens"])
