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
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils.import_utils import is_serve_available  # noqa: E402

from tppo.label_openai import EndpointConfig, LabelItem, label  # noqa: E402
from tppo.label_prompt import prompt  # noqa: E402
from tppo.tokenizer import train_tokenizer  # noqa: E402

ITEM = LabelItem("s0", ["boots"], ["red shoes"], "red shoes")
STARTS_WITHIN_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of random weights with a chat template."""
    path = tmp_path_factory.mktemp("serve") / "model"
    tokenizer = train_tokenizer([prompt(ITEM)], 400)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 2048}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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


def test_a_model_that_cannot_judge_gives_no_label_and_its_tokens_are_counted(
    url, model, tmp_path, capsys, monkeypatch
):
    """Random weights answer nonsense: it comes back once with the reason, then it is dropped."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = EndpointConfig(url, str(model), None, max_tokens=12, concurrency=1, max_retries=0)
    run = label([ITEM], config, tmp_path / "cache.jsonl")
    assert run.labels == [] and not (tmp_path / "cache.jsonl").exists()
    reason = run.dropped[0].reason
    assert re.search("no <WORD_SEQ|cut at the server's limit|holds no text", reason), reason
    shown = capsys.readouterr().err
    read = re.search(r"labelling: (\d) replies, ([\d,]+) tokens read, (\d+) written", shown)
    assert read, shown
    replies, tokens, written = (int(part.replace(",", "")) for part in read.groups())
    assert replies == 2 or "no text" in reason
    assert tokens > 100 and 1 <= written <= 12 * replies
