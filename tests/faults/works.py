"""The commands that write into a run folder, each tiny, and where each of them starts."""

import json
import threading
from collections.abc import Callable
from typing import NamedTuple

from endpoint import verdict

SETTINGS = {
    "sessions": {"train_users": 40, "heldout_users": 8, "test_users": 8, "transfer_users": 4},
    "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 4, "eval_every": 2, "batch_size": 16},
    "generate": {"samples": 32, "max_new_tokens": 8, "batch_size": 16},
    "reward_model": {"epochs": 1, "batch_size": 16},
    "ppo": {"steps": 3, "batch_size": 8, "minibatch_size": 8, "checkpoint_every": 1,
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
    "eval": {"temperatures": [1.0], "heat_users": 1, "noise_answers": 16},
    "ser": {"rounds": 1, "seed_share": 0.5},
    "pit": {"stage_0": 2, "stage_1": 1, "improve_steps": 1},
}  # fmt: skip
STUDY = {
    "parts": [{"arms": [{"name": "words"}, {"name": "end", "paid": "end"}], "answers": [8],
               "steps": 1, "step_answers": 8}],
    "fresh_answers": 8, "users": 8, "reward_updates": 2,
    "settings": SETTINGS | {"generate": {"samples": 16, "max_new_tokens": 8, "batch_size": 16}},
}  # fmt: skip


class Work(NamedTuple):
    """A command: its line, what it leaves, and whose run folder it starts from."""

    command: str
    makes: tuple[str, ...]  # folders and files of the run folder
    after: str | None = None
    begins: str = ""  # part of the path where the work begins; moments count from there
    asks: str = ""  # the cache of what an endpoint is paid for, the journal of what people said
    given: Callable | None = None  # writes into the folder beforehand


def stage(name, after, flags="", **others):
    """A stage of a run."""
    return Work(f"{name} --out {{folder}} {flags}", (name,), after, f"/{name}.tmp", **others)


def second(name, after, flags="", **others):
    """A stage in the second round."""
    work = stage(name, after, f"--round 2 {flags}", **others)
    return work._replace(makes=(f"{name}-2",), begins=f"/{name}-2.tmp")


def _once(path, text):
    """Write a file that all copies of a run read: never empty, however many are made at once."""
    if not path.exists():
        new = path.with_name(f"{path.name}.{threading.get_ident()}")
        new.write_text(text)
        new.replace(path)


def _study(place, folder):
    _once(place / "study.yaml", json.dumps(STUDY))


def _no_report(place, folder):
    (folder / "report.html").unlink()


def _pairs(place, folder):
    rows = [{"prompt": f"red shoes {i}\n", "chosen": f"trail shoes {i}", "rejected": "a b"}
            for i in range(12)]  # fmt: skip
    _once(place / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def answers_of(requests):
    """What a batch API gives back for a file of requests: its lines in another order."""
    rows = [json.loads(line) for line in requests.read_text().splitlines()]
    found = []
    for row in reversed(rows):
        message = {"role": "assistant", "content": verdict(row["body"]["messages"][0]["content"])}
        body = {"object": "chat.completion", "model": row["body"]["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        response = {"status_code": 200, "request_id": "r", "body": body}
        found.append({"id": "r", "custom_id": row["custom_id"], "response": response,
                      "error": None})  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in found)


def _answers(place, folder):
    (folder / "answers.jsonl").write_text(answers_of(folder / "batch.jsonl"))


ASK = ("--label.labeller endpoint --label.endpoint.base-url {url} --label.endpoint.model m "
       "--label.endpoint.api-key-env None --label.endpoint.concurrency 4 ")  # fmt: skip
JUDGE = ("--eval.judge endpoint --eval.endpoint.base-url {url} --eval.endpoint.model m "
         "--eval.endpoint.api-key-env None --eval.endpoint.concurrency 4")  # fmt: skip
RUN = ("data", "sft", "generate", "label", "map", "train-rm", "train", "eval", "heat")
BATCH = ("label --out {folder} --label.labeller endpoint --label.endpoint.model m "
         "--label.endpoint.api-key-env None")  # fmt: skip
BY_HAND = "--label.hand.no-browser"  # who has it opens the page himself
HAND = f"--label.labeller hand --label.hand.answers 14 {BY_HAND}"
PAIRS = f"--label.hand.pairs 12 {BY_HAND}"
LORA = "--lora.rank 2"
OWN = "--out {folder}/own --model {folder}/sft/model --config {place}/tiny.yaml"
WORKS = {
    "data": stage("data", None, "--config {place}/tiny.yaml"),
    "sft": stage("sft", "data"),
    "generate": stage("generate", "sft"),
    "label": stage("label", "generate"),
    "map": stage("map", "label"),
    "train-rm": stage("train-rm", "map"),
    "train": stage("train", "train-rm"),
    "eval": stage("eval", "train"),
    "heat": stage("heat", "eval"),
    "noise": stage("noise", "train-rm"),
    "baselines": stage("baselines", "train"),
    "label by an endpoint": stage("label", "generate", ASK, asks="label-cache.jsonl"),
    "eval by an endpoint": stage("eval", "train", JUDGE, asks="judge-cache.jsonl"),
    "label by hand": stage("label", "generate", HAND, asks="hand-labels.jsonl"),
    "prefer": second("prefer", "generate, round 2", PAIRS, asks="hand-pairs-2.jsonl"),
    "export a batch": Work(f"{BATCH} --export-batch {{folder}}/batch.jsonl", ("batch.jsonl",),
                           "generate"),
    "import a batch": Work(f"{BATCH} --import-batch {{folder}}/answers.jsonl",
                           ("label-cache.jsonl",), "export a batch", given=_answers),
    "label by a batch": stage("label", "import a batch", ASK, asks="label-cache.jsonl"),
    "train by d2lols": stage("train", "train-rm", "--algorithm d2lols"),
    "map, endpoint": stage("map", "label by an endpoint"),
    "ser by words": stage("ser", "map, endpoint", "--ser.labels words"),
    "ser-train": stage("ser-train", "ser by words"),
    "generate, round 2": second("generate", "map, endpoint"),
    "label, round 2": second("label", "generate, round 2", ASK, asks="label-cache.jsonl"),
    "map, round 2": second("map", "label, round 2"),
    "ser by pairs": second("ser", "map, round 2", "--ser.labels pairs"),
    "pit": stage("pit", "train-rm"),
    "improve": stage("improve", "pit"),
    "train-rm by LoRA": stage("train-rm", "map", LORA),
    "train by LoRA": stage("train", "train-rm by LoRA"),
    "merge": stage("merge", "train by LoRA"),
    "train by a function": Work(f"train {OWN} --data {{place}}/pairs.jsonl --reward works:length",
                                ("own/train",), "sft", "/own/train.tmp", given=_pairs),
    "ser on a file": Work(f"ser {OWN} --pairs {{place}}/pairs.jsonl", ("own/ser",), "sft",
                          "/own/ser.tmp", given=_pairs),
    "pit on a file": Work(f"pit {OWN} --pairs {{place}}/pairs.jsonl", ("own/pit",), "sft",
                          "/own/pit.tmp", given=_pairs),
    "run": Work("run --out {folder} --config {place}/tiny.yaml", RUN, begins="/data.tmp"),
    "report": Work("report --out {folder}", ("report.html",), "eval", given=_no_report),
    "study": Work("study {place}/study.yaml --out {folder} --workers 1",
                  ("study.json", "outcomes.jsonl"), given=_study),  # fmt: skip
}  # fmt: skip

LOCKED = [name for name in WORKS if name != "report"]  # that keep other processes out
RESUMED = ("sft", "generate", "train-rm", "train", "eval", "baselines", "train by d2lols", "pit",
           "ser by words", "ser by pairs", "ser-train", "ser on a file", "pit on a file",
           "train by LoRA", "train by a function")  # fmt: skip
READERS = (  # reader, whose files it reads
    ("sft", "data"), ("generate", "sft"), ("label", "generate"), ("map", "label"),
    ("train-rm", "map"), ("train", "train-rm"), ("eval", "train"), ("heat", "eval"),
    ("improve", "pit"), ("ser-train", "ser by words"), ("merge", "train by LoRA"),
    ("prefer", "generate, round 2"),
    ("train by LoRA", "train-rm by LoRA"),
)  # fmt: skip


def filled(command, **values):
    """The words of a command line; no place has a blank in its name."""
    return [word.format_map(values) for word in command.split()]


def length(prompts, completions, **columns):
    """A reward function of one's own."""
    return [float(len(text)) for text in completions]
