"""The endpoint labeller against `transformers serve`, an OpenAI-compatible server of others."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
pytest.importorskip("pydantic", reason="pydantic is not installed: pip install tppo-kernels[label]")

import torch  # noqa: E402
from test_label_openai import answer, judge, label  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils.import_utils import is_serve_available  # noqa: E402

from tppo.labels.endpoint.live import EndpointConfig, LabelItem  # noqa: E402
from tppo.labels.endpoint.prompt import REPAIR, BadAnswer, parse, prompt  # noqa: E402
from tppo.models.tokenizer import train_tokenizer  # noqa: E402

GOOD = [
    LabelItem("s0", ["boots"], ["red shoes"], "red shoes\nblue hat"),
    LabelItem("s1", ["rain"], ["warm jacket"], "warm jacket"),
]
MENDED = LabelItem("s2", ["gift"], ["green tea"], "green tea cup")  # right at the second try
UNKNOWN = LabelItem("s3", ["lamp"], ["desk lamp"], "yellow desk lamp")
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STARTS_WITHIN_S = 60


def user(text):
    return {"role": "user", "content": text}


def dialogues():
    """(messages, answer) that the model is to know by heart."""
    for item in (*GOOD, MENDED):
        right = judge({"messages": [user(prompt(item))]})
        if item is MENDED:
            wrong = answer([("green", 1), ("tea", 1)])
            yield [user(prompt(item))], wrong
            with pytest.raises(BadAnswer) as error:
                parse(wrong, item.response)
            said = {"role": "assistant", "content": wrong}
            yield [user(prompt(item)), said, user(REPAIR.format(reason=error.value))], right
        else:
            yield [user(prompt(item))], right


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a chat template that was trained until it knows the dialogues by heart."""
    path = tmp_path_factory.mktemp("serve") / "model"
    pairs = list(dialogues())
    texts = [message["content"] for messages, _ in pairs for message in messages]
    tokenizer = train_tokenizer([*texts, *(text for _, text in pairs)], 700)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "max_position_embeddings": 2048}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    learn(model, tokenizer, pairs)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def learn(model, tokenizer, pairs):
    """Train until greedy decoding must give every answer."""
    rows = []
    for messages, text in pairs:
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        told = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((torch.tensor([[*asked, *told]]), len(asked)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        known = True
        for ids, start in rows:
            logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
            target = ids[0, start:]
            known = known and bool((logits.argmax(-1) == target).all())
            torch.nn.functional.cross_entropy(logits, target).backward()
        if known:
            return
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pytest.fail("the model did not learn the dialogues")


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    if not is_serve_available():
        pytest.skip("the server is not installed: pip install transformers[serving]")
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home / "log"
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command += ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as file:
        server = subprocess.Popen(
            command, env={**os.environ, **offline}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server, address, log):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            return opener.open(address, timeout=2).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)


def replies(shown):
    """(replies, tokens read, tokens written) of the closing line."""
    found = re.search(r"labelling: (\d+) replies, ([\d,]+) tokens read, ([\d,]+) written", shown)
    assert found, shown
    return [int(part.replace(",", "")) for part in found.groups()]


def test_answers_of_a_real_server_become_labels_and_are_paid_for_once(
    url, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = EndpointConfig(url, str(model), None, concurrency=2, max_retries=0)
    run = label([*GOOD, MENDED], config, tmp_path / "cache.jsonl")
    assert run.dropped == []
    assert [dict(each.words) for each in run.labels] == [
        {"red": 1, "shoes": 1, "blue": 0, "hat": 0},
        {"warm": 1, "jacket": 1},
        {"green": 1, "tea": 1, "cup": 0},
    ]
    assert [each.labeller for each in run.labels] == [str(model)] * 3
    count, read, written = replies(capsys.readouterr().err)
    assert count == 4 and read > 1000 and written > 100  # one answer was sent back
    gone = EndpointConfig("http://127.0.0.1:1/v1", str(model), None)
    assert label([MENDED, *GOOD], gone, tmp_path / "cache.jsonl").labels == [
        run.labels[2], *run.labels[:2]
    ]  # fmt: skip


def test_an_answer_that_is_none_is_sent_back_once_unless_it_was_cut_and_dropped(
    url, model, tmp_path, capsys, monkeypatch
):
    """What the model never saw it answers with words that are not in the response."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = EndpointConfig(url, str(model), None, max_tokens=120, max_retries=0, max_dropped=1.0)
    run = label([UNKNOWN], config, tmp_path / "cache.jsonl")
    assert run.dropped[0].by == "judge" and not (tmp_path / "cache.jsonl").exists()
    count, read, written = replies(capsys.readouterr().err)
    cut_at_once = "was cut" in run.dropped[0].reason and count == 1
    assert (cut_at_once or count == 2) and read > 100 and 1 <= written <= 120 * count
