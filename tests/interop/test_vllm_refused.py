"""A vLLM server that refuses every JSON schema by itself: what is validated here becomes a label.

Its tokenizer is one of bytes, written in Python, which the library that holds models to a schema
(`guidance`) does not take, so vLLM answers each request for one with HTTP 400.  Its model is a tiny
one that is trained here to write judgements of some answers, of some after it is asked again, and
of some none that counts: so both what is labelled and what is not are known beforehand.
"""

import json

import pytest
import torch
from _vllm_server import Between, VLLMServer
from torch.nn.utils.rnn import pad_sequence
from transformers import ByT5Tokenizer, Gemma2Config, Gemma2ForCausalLM

from tppo.labels.endpoint.live import (
    Dropped,
    EndpointConfig,
    EndpointError,
    LabelItem,
    label,
)
from tppo.labels.endpoint.prompt import REPAIR, prompt
from tppo.sessions.config import SessionsConfig
from tppo.sessions.prompts import history_lines
from tppo.sessions.synthetic import generate_sessions

SEEN = 192  # bytes that a layer looks back: so the model can be trained with the ends of messages
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
FLAGS = ("--max-model-len", "4096", "--max-num-seqs", "16", "--served-model-name", "judge",
         "--chat-template", CHAT, "--structured-outputs-config", '{"backend": "guidance"}')
WORDS = "<WORD_SEQUENCE_JUDGEMENTS>\n{}\n</WORD_SEQUENCE_JUDGEMENTS>\n"
WHOLE = '<ACROSS_QUERY_JUDGEMENTS>\n{{"label": {}}}\n</ACROSS_QUERY_JUDGEMENTS>'


def form(words, sentence):
    listed = [{"word": word, "label": value} for word, value in words]
    return WORDS.format(json.dumps(listed)) + WHOLE.format(sentence)


RIGHT = {
    "red shoes": ([("red", 1), ("shoes", 1)], 1),
    "blue tent\nold lamp": ([("blue", 0), ("tent", 1), ("old", 0), ("lamp", 0)], 0),
    "green coat": ([("green", 1), ("coat", 0)], 1),
}
OTHER_WORD, NO_LABEL = form([("green", 1), ("coats", 0)], 1), form([("cheap", 2), ("boots", 1)], 1)
PROSE = "Both words suit this user."
WRITTEN = {  # by answer, what the model is to write, and what when it is told why that is none
    "red shoes": [form(*RIGHT["red shoes"])],
    "blue tent\nold lamp": [form(*RIGHT["blue tent\nold lamp"])],
    "green coat": [OTHER_WORD, form(*RIGHT["green coat"])],
    "cheap boots": [NO_LABEL, NO_LABEL],
    "warm hat": [PROSE, PROSE],
}
REASONS = {  # what is wrong with those that are no judgement
    OTHER_WORD: "the words are not those of the response: 's' stands where '' was expected",
    NO_LABEL: "WORD_SEQUENCE_JUDGEMENTS at 0: Value error, label was 2, expected 0 or 1",
    PROSE: "no <WORD_SEQUENCE_JUDGEMENTS>...</WORD_SEQUENCE_JUDGEMENTS> in the answer",
}


def items():
    """100 of them: to each of 20 histories the same five answers."""
    small = SessionsConfig(train_users=20, heldout_users=1, test_users=1, transfer_users=0)
    return [LabelItem(f"{i}/{j}", history_lines(session), list(session.targets), text)
            for i, session in enumerate(generate_sessions(small, 0).train[:20])
            for j, text in enumerate(WRITTEN)]  # fmt: skip


def conversations():
    """The end of each message that the model gets, and what it is to write."""
    found = set()
    for item in items():
        said = prompt(item) + "\n"
        for text in WRITTEN[item.response]:
            found.add((said[-260:], text))
            if text in REASONS:
                said += f"{text}\n{REPAIR.format(reason=REASONS[text])}\n"
    return sorted(found)


def trained(tokenizer, steps=600, batch=8):
    """A model of 0.1M parameters that writes what stands above."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, vocab_size=384,
        max_position_embeddings=8192, sliding_window=SEEN, layer_types=["sliding_attention"] * 2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))  # fmt: skip
    examples = []
    for asked, text in conversations():
        before, behind = (tokenizer(x, add_special_tokens=False)["input_ids"]
                          for x in (asked, text))  # fmt: skip
        behind.append(tokenizer.eos_token_id)
        examples.append((before + behind, [-100] * len(before) + behind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 30))
    generator, losses = torch.Generator().manual_seed(0), [9.0]
    while max(losses[-5:]) > 0.004:
        assert len(losses) <= steps, f"no such model: {losses[-5:]}"
        picked = torch.randint(len(examples), (batch,), generator=generator).tolist()
        ids, labels = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
            for rows, pad in zip(zip(*(examples[i] for i in picked), strict=True),
                                 (tokenizer.pad_token_id, -100), strict=True)
        )  # fmt: skip
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    print(f"{len(losses)} steps")
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("judge")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = ByT5Tokenizer()
    trained(tokenizer).eval().save_pretrained(root / "model")
    torch.set_num_threads(threads)
    tokenizer.save_pretrained(root / "model")
    with VLLMServer(root / "model", root / "log", *FLAGS) as up:
        yield up


def test_without_the_schema_what_is_valid_becomes_a_label_and_what_is_not_is_dropped(
    server, tmp_path, capfd
):
    asked = items()
    assert len({prompt(item) for item in asked}) == len(asked) == 100
    with Between(server.url) as proxy:  # refuses nothing: it keeps what vLLM replies
        config = EndpointConfig(base_url=f"{proxy.url}/v1", model="judge", api_key_env=None,
                                max_tokens=400, timeout_s=600.0, max_dropped=0.5)  # fmt: skip
        found = list(label(asked, config, tmp_path / "cache.jsonl", len(asked)))
        replies, texts = proxy.kept, proxy.texts()
    # vLLM has refused the schema that names words, and the general one.
    refused = [(body["response_format"], reply["error"]) for body, status, reply in replies
               if status == 400]  # fmt: skip
    assert {"prefixItems" in json.dumps(schema) for schema, _ in refused} == {True, False}
    assert all("fast" in error["message"] for _, error in refused), refused[0][1]
    assert all(status == (400 if "response_format" in body else 200) for body, status, _ in replies)
    assert len(refused) <= 2 * config.concurrency
    told = capfd.readouterr()
    assert (told.out + told.err).count("refuses a JSON schema: from now on asked without") == 1
    # The model has written what it was trained to.
    assert {prompt(item): WRITTEN[item.response] for item in asked} == texts
    # Of each item there is one result: its judgement, or why there is none.
    assert len(found) == len(asked)
    for one, item in zip(found, asked, strict=True):
        assert one.id == item.id
        if item.response in RIGHT:
            words, sentence = RIGHT[item.response]
            assert (one.words, one.sentence) == (tuple(words), sentence)
        else:
            assert isinstance(one, Dropped) and one.by == "judge"
            assert one.reason == REASONS[WRITTEN[item.response][-1]]
    dropped = sum(isinstance(one, Dropped) for one in found)
    assert f"{dropped} of 100 items got no label" in told.out + told.err and dropped == 40
    # What counts is on disk, and asked for once.
    kept = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
    assert len(kept) == 60 == len({line["key"] for line in kept})
    print(f"refused by vLLM: {len(refused)} requests; of 100 items 40 are labelled at once, 20 "
          "when asked again, 40 dropped with their reason")  # fmt: skip


def test_more_that_are_dropped_than_is_allowed_end_the_run_with_a_sentence(server, tmp_path):
    config = EndpointConfig(base_url=f"{server.url}/v1", model="judge", api_key_env=None,
                            max_tokens=400, timeout_s=600.0)  # fmt: skip
    found, asked = [], items()[:20]
    with pytest.raises(EndpointError, match="items got no label, more than the 5 % of"):
        found.extend(label(asked, config, tmp_path / "cache.jsonl", len(asked)))
    known = {one.id for one in found if not isinstance(one, Dropped)}  # and were given out before
    assert known == {item.id for item in asked if item.response in RIGHT}
