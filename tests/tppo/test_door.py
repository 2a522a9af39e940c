"""The Python door: a model, prompts and a reward of one's own; the same by `tppo train`."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from _weights import enlarged
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_mapping import CORPUS, FAMILIES
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tppo
from tppo.cli import main
from tppo.errors import DataError
from tppo.methods.ppo import PPO
from tppo.models.policy import Critic
from tppo.rewards.user_function import named_with_source
from tppo.stages.given import described
from tppo.stopping import listening

WORDS = ["red shoes", "cheap boots", "running socks", "red boots and socks"]
PROMPTS = [{"prompt": f"{word}\n", "letter": "e"} for word in WORDS]
CHATS = [[{"role": "user", "content": word}] for word in WORDS]
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
CONFIG = tppo.PPOConfig(
    steps=4, max_passes=9, batch_size=4, responses_per_prompt=2, minibatch_size=4, lr=3e-3,
    critic_lr=3e-3, kl_coef=0.01, checkpoint_every=2, eval_every=2, max_kl=1e3,
)  # fmt: skip
GIVEN = ("steps", "max_passes", "batch_size", "responses_per_prompt", "minibatch_size", "lr",
         "critic_lr", "kl_coef", "checkpoint_every", "eval_every", "max_kl")  # fmt: skip
SHORT = tppo.GenerateConfig(max_new_tokens=6)


def by_letter(completions, letter):
    """Every such letter of an answer pays 1, at its span."""
    pairs = zip(completions, letter, strict=True)
    return [[(i, i + 1, 1.0) for i, c in enumerate(text) if c == x] for text, x in pairs]


def letters(completions, letter):
    """The same as a number."""
    return [text.count(x) for text, x in zip(completions, letter, strict=True)]


def lengths(completions):
    return [len(text) for text in completions]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    backend, trainer = FAMILIES["byte-level"]()
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    enlarged(LlamaForCausalLM(config), std=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def door(model, out, **changes):
    given = {"reward": by_letter, "prompts": PROMPTS, "config": CONFIG, "generate": SHORT}
    return tppo.PPOTrainer(model, out=out, **given | changes)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory, one_thread):
    """A finished training, with the folder that it was given."""
    out = tmp_path_factory.mktemp("door")
    trainer = door(model, out)
    before = trainer.answer(PROMPTS * 8)
    trainer.train()
    return trainer, out, before


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_span_reward_is_raised_and_everything_is_kept(model, trained, tmp_path, capsys):
    trainer, out, before = trained
    after = trainer.answer(PROMPTS * 8)
    assert sum(letters(after, "e" * 32)) > sum(letters(before, "e" * 32))
    rows = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] == [row["step"] for row in trainer.metrics]
    report = json.loads((out / "train/report.json").read_text())
    assert report["kept_step"] == 4 and "by_letter" in report["reward"]
    assert report["reward"] == trainer.report["reward"]
    assert not (out / "train/checkpoints").exists()
    trainer.save(tmp_path / "saved")
    assert_same(weights(tmp_path / "saved"), weights(out / "train/model"))
    (text,) = trainer.answer([WORDS[0]], temperature=0.0)
    for folder in (out, tmp_path / "saved"):  # asked as it was asked here
        (found,) = tppo.load(folder).answers([WORDS[0]], temperature=0.0)[0]
        assert found.text == text and found.reward is None
    assert any((weights(model)[n] != w).any() for n, w in weights(tmp_path / "saved").items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(dict(loaded.named_parameters()), dict(trainer.model.named_parameters()))


def test_what_the_door_saves_is_used_as_what_it_was_given(model, trained, tmp_path):
    """The chat template, the generation config and the card of the stage's own export."""
    trainer, out, _ = trained
    trainer.save(tmp_path / "saved")
    for folder in (tmp_path / "saved", out / "train/model"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template(CHATS[0], tokenize=False) == f"{WORDS[0]}\n"
        given, kept = (json.loads((path / "generation_config.json").read_text())
                       for path in (model, folder))  # fmt: skip
        assert kept == given and kept["eos_token_id"] == 2
    cards = [ModelCard.load(path / "README.md")
             for path in (tmp_path / "saved", out / "train/model")]  # fmt: skip
    assert cards[0].text.splitlines()[2:] == cards[1].text.splitlines()[2:]  # behind the title
    assert "token-level PPO, 4 of 4 steps" in cards[0].text
    assert cards[0].data.to_dict() == cards[1].data.to_dict()
    untrained = door(model, tmp_path / "out")
    untrained.save(tmp_path / "untrained")
    assert not (tmp_path / "untrained/README.md").exists()


def test_a_step_too_small_for_16_bits_is_no_standstill(model, tmp_path):
    """A run in bfloat16 with a small learning rate ended after its first step, though the weights
    in float32, of which the model's are rounded copies, had moved.
    """
    config = replace(CONFIG, steps=2, lr=1e-8)
    trainer = door(model, tmp_path, config=config, loading=tppo.ModelConfig(dtype="bfloat16"))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert trainer.train()["kept_step"] == 2
    assert_same(before, dict(trainer.model.named_parameters()))


def test_without_heldout_prompts_the_last_weights_are_kept_and_that_is_said(
    model, tmp_path, capfd
):
    config = replace(CONFIG, steps=9, max_passes=1.0, batch_size=2)
    door(model, tmp_path, config=config, reward=lengths).train()
    said = capfd.readouterr().err
    assert "kept step 2, the last: nothing is held out" in said
    assert "2 of 9 steps, because max_passes is 1 and a step takes 2 of 4 prompts" in said


def test_heldout_prompts_are_judged_by_the_judge_or_else_by_the_reward(model, tmp_path, capfd):
    trainer = door(model, tmp_path / "a", heldout=PROMPTS[:2], judge=letters)
    trainer.train()
    assert [("heldout/score" in row) for row in trainer.metrics] == [False, True, False, True]
    assert "judged by the reward" not in capfd.readouterr().err
    trainer = door(model, tmp_path / "b", heldout=PROMPTS[:2])
    trainer.train()
    assert "heldout/reward" in trainer.metrics[-1]
    assert "held-out answers are judged by the reward that is trained on" in capfd.readouterr().err
    best = max(trainer.metrics[1::2], key=lambda row: row["heldout/reward"])
    assert trainer.report["kept_step"] == best["step"]


def test_chats_and_a_number_for_the_whole_answer_without_a_critic(model, tmp_path, monkeypatch):
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [float(message["content"].count("e")) for (message,) in completions]

    monkeypatch.setattr(Critic, "from_policy", None)  # to load one would be an error
    for advantage in ("rloo", "grpo"):
        seen.clear()
        config = replace(CONFIG, steps=1, advantage=advantage)
        door(model, tmp_path, reward=reward, prompts=CHATS, config=config).train()
    ((prompts, completions, columns),) = seen
    assert len(prompts) == 8 and prompts[0] == prompts[1] and all(p in CHATS for p in prompts)
    assert all(m["role"] == "assistant" for (m,) in completions)
    assert set(columns) == {"completion_ids"}
    assert not (tmp_path / "train/critic.safetensors").exists()


KILLED = """
import os, signal

def by_letter(completions, letter):
    with open("calls", "a") as file:
        file.write("x")
    if os.path.getsize("calls") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return [[(i, i + 1, 1.0) for i, c in enumerate(text) if c == x]
            for text, x in zip(completions, letter)]
"""


def train_through_a_kill(folder, monkeypatch, module, model, config, *more):
    """`tppo train --reward` in the folder, killed in step 4 and run again to its end, in `o`.

    module: where the reward stands; of a name of its own, because Python keeps what it imported.
    The killed process has one thread, and so has to have who calls this: fixture `one_thread`.
    """
    (folder / f"{module}.py").write_text(KILLED)
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    flags = ["train", "--reward", f"{module}:by_letter", "--data", "p.jsonl", "--out", "o",
             "--model", str(model), "--generate.max-new-tokens", "6", *more]  # fmt: skip
    for name in GIVEN:
        flags += [f"--ppo.{name.replace('_', '-')}", str(getattr(config, name))]
    killed = subprocess.run([sys.executable, "-m", "tppo", *flags], cwd=folder, timeout=600,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "o/train.tmp/checkpoints/step-2").is_dir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", list(sys.path))
    main(flags)
    assert (folder / "calls").stat().st_size == 4 + 2  # steps 3 and 4 again


def test_the_command_gives_the_same_weights_after_a_kill(model, trained, tmp_path, monkeypatch):
    """`tppo train --reward`, killed in step 4 and run again, ends where the script did."""
    train_through_a_kill(tmp_path, monkeypatch, "my_reward", model, CONFIG)
    assert_same(weights(tmp_path / "o/train/model"), weights(trained[1] / "train/model"))


def test_the_command_says_what_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "p.jsonl").write_text('{"prompt": "red"}\n')
    (tmp_path / "other_reward.py").write_text("def f(completions): return [0] * len(completions)")
    data, of_model = ["--data", "p.jsonl"], ["--model", str(model)]
    reward = ["--reward", "other_reward:f"]
    for flags, message in [
        (["--reward", "nowhere_reward:f", *data, *of_model], "no module 'nowhere_reward'"),
        (["--reward", "other_reward:g", *data, *of_model], "has no 'g'"),
        (["--reward", "other_reward", *data, *of_model], "expected module:function"),
        ([*reward, *of_model], "--data was not given, expected a JSONL file of prompts"),
        ([*reward, *data], "--model was not given, expected"),
        ([*data, *of_model, "--heldout", "p.jsonl"], "--reward was not given, expected module"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["train", "--out", "o", *flags])
    assert not (tmp_path / "o").exists()


def test_another_reward_begins_anew_and_says_so(model, tmp_path, capfd):
    def stops(at, value):
        calls = []

        def reward(completions):
            calls.append(1)
            if len(calls) == at:
                raise RuntimeError("enough")
            return [value * len(text) for text in completions]

        return reward

    with pytest.raises(DataError, match="raised RuntimeError: enough"):
        door(model, tmp_path, reward=stops(3, 1.0)).train()
    kept = tmp_path / "train.tmp/checkpoints/step-2"
    assert kept.is_dir()
    again = door(model, tmp_path, reward=by_letter)
    again.train()
    assert "starts anew and deletes its checkpoints" in capfd.readouterr().err
    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4]


def test_ctrl_c_saves_the_step_and_the_next_call_goes_on(model, tmp_path, trained, capfd):
    interrupt = [3]

    def by_letter_until(completions, letter):
        interrupt[0] -= 1
        if interrupt[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return by_letter(completions, letter)

    trainer = door(model, tmp_path, reward=by_letter_until)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "stopped by Ctrl-C: it is saved after step 3 of 4. The same" in capfd.readouterr().err
    trainer.train()
    assert "resumes after step 3 of 4" in capfd.readouterr().err
    assert_same(weights(tmp_path / "train/model"), weights(trained[1] / "train/model"))


def test_listening_inside_of_listening_changes_nothing():
    with listening():
        outer = signal.getsignal(signal.SIGINT)
        with listening():
            assert signal.getsignal(signal.SIGINT) is outer
        assert signal.getsignal(signal.SIGINT) is outer
    assert signal.getsignal(signal.SIGINT) is not outer


class Half:
    """A reward that forgets its type: a tensor."""

    def __call__(self, batch, answers):
        return batch.mask / 2


def test_a_skipped_batch_is_replayed_and_the_trainer_stays_as_it_is(
    model, tmp_path, monkeypatch, capsys
):
    real, calls = PPO._backward, []

    def backward(self, *given):
        calls.append(1)
        losses = real(self, *given)
        return losses._replace(policy=losses.policy * math.nan) if len(calls) == 2 else losses

    monkeypatch.setattr(PPO, "_backward", backward)
    trainer = door(model, tmp_path / "out")
    trainer.train()
    (path,) = (tmp_path / "out/spoilt").glob("*.json")
    assert f"{path}` repeats it" in capsys.readouterr().err
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    files = sorted(found for found in (tmp_path / "out").rglob("*") if found.is_file())
    said = trainer.replay(path)
    assert "policy loss is nan" in said and "every figure is finite with these weights" in said
    assert_same(before, dict(trainer.model.named_parameters()))
    assert files == sorted(found for found in (tmp_path / "out").rglob("*") if found.is_file())
    with pytest.raises(DataError, match="no batch that PPO has skipped"):
        trainer.replay(tmp_path / "out/train/report.json")
    with pytest.raises(SystemExit, match=r"tppo.PPOTrainer\(...\).replay\(FILE\)"):
        main(["replay", str(path)])


def test_a_model_that_is_loaded_is_told_how_to_become_a_folder(model):
    with pytest.raises(DataError, match=r"model was a LlamaForCausalLM, .*save_pretrained\(FOLDER"):
        door(AutoModelForCausalLM.from_pretrained(model), "out")


def made(text, name="f", **known):
    """What `exec` makes has no source, like what is typed at a prompt."""
    exec(text, known)
    return known[name]


def test_what_has_no_source_is_told_apart_by_its_code():
    one, same, other, more = (
        named_with_source(made(f"f = lambda completions: [{value} for c in completions if {test}]"))
        for value, test in ((1, "c"), (1, "c"), (2, "c"), (1, "c in {'a', 'b'}"))
    )
    assert one == same and len({one, other, more}) == 3
    classes = [named_with_source(made(f"class f:\n def __call__(self, x): return {n}")())
               for n in (1, 1, 2)]  # fmt: skip
    assert classes[0] == classes[1] != classes[2]


def test_an_object_that_is_bound_does_not_change_the_name_in_another_process():
    """Its address is another there, and the training would begin anew."""
    one, other = (partial(letters, letter=thing) for thing in (Half(), Half()))
    assert named_with_source(one) == named_with_source(other)
    assert named_with_source(partial(letters, letter="a")) != named_with_source(one)
    total = [described(tppo.TerminalReward(tppo.FunctionReward(f))) for f in (letters, lengths)]
    assert total[0] != total[1] and "lengths" in total[1]


def test_every_step_is_taken_unless_passes_are_limited_and_a_finished_result_is_not_lost_silently(
    model, tmp_path, capfd
):
    config = replace(CONFIG, steps=3, max_passes=None, minibatch_size=8, epochs=1)
    trainer = door(model, tmp_path, prompts=PROMPTS[:1], config=config, reward=lengths)
    trainer.train()
    assert len(trainer.metrics) == 3
    said = capfd.readouterr().err
    assert "a step takes all 1 prompts (batch_size is 4)" in said and "WARNING" not in said
    door(model, tmp_path, config=replace(config, steps=1)).train()
    said = capfd.readouterr().err
    assert "train holds a finished training, which is replaced when this one ends" in said
    assert "config.ppo.steps was 3, is 1" in said and "by_letter" in said


def test_a_training_in_another_thread_is_not_stopped_by_an_earlier_signal(model, tmp_path):
    with pytest.raises(KeyboardInterrupt), listening():
        signal.raise_signal(signal.SIGINT)
    trainer, ended = door(model, tmp_path, config=replace(CONFIG, steps=2)), []
    thread = threading.Thread(target=lambda: ended.append(trainer.train()))
    thread.start()
    thread.join()
    assert len(ended) == 1 and len(trainer.metrics) == 2


WRONG = {
    "reward": ({"reward": 3}, "reward was 3, a int, expected a function"),
    "a column": ({"reward": lambda completions, lettre: []},
                 "takes 'lettre'.*did you mean 'letter'"),
    "a column of heldout": ({"heldout": ["red"]}, "takes 'letter'.*they have none"),
    "a judge alone": ({"judge": letters}, "judge was given and heldout was None"),
    "no judge": ({"judge": 3, "heldout": PROMPTS}, "judge was 3, a int, expected a function"),
    "a class": ({"reward": Half}, "reward was the class Half, expected an object of it: Half"),
    "a Reward of other names": ({"reward": lambda b, a: []},
                                "takes 'b'.*a tppo.Reward is told by the names of its parameters"),
    "a Reward in a list": ({"reward": [lengths, lambda batch, answers: []]},
                           r"reward\[1\] was a tppo.Reward, .*expected functions alone in a list"),
    "a column of the total": ({"reward": tppo.TerminalReward(tppo.FunctionReward(letters)),
                               "prompts": ["red"]}, "takes 'letter'.*they have none"),
    "a column of the judge": ({"judge": lambda completions, lettre: [], "heldout": PROMPTS},
                              "judge .*takes 'lettre'.*did you mean 'letter'"),
    "a judge without a name": ({"judge": lambda answers: {}, "heldout": PROMPTS},
                               "is called with .answers. and has no name"),
    "an advantage by name": ({"advantage": "grpo"}, "expected a tppo.Advantage; by name it is"),
    "an advantage's class": ({"advantage": tppo.GRPO}, "advantage was .*expected an object"),
    "an advantage that says nothing": ({"advantage": lengths}, "has no needs_critic, expected"),
    "one response": ({"advantage": tppo.RLOO(0.1), "config": tppo.PPOConfig()},
                     "responses_per_prompt was 1, expected at least 2 with RLOO"),
    "a dict of settings": ({"config": {"steps": 3}}, "config was .*expected a tppo.PPOConfig"),
    "a dict of sampling": ({"generate": {"temperature": 1}}, "expected a tppo.GenerateConfig"),
    "seed": ({"seed": "0"}, "seed was '0', expected a whole number"),
    "half a seed": ({"seed": 1.5}, "seed was 1.5, expected a whole number"),
    "device": ({"device": "gpu"}, "device was 'gpu', expected auto, cpu"),
    "prefix": ({"prefix": "none"}, "prefix was 'none', expected shared or dense"),
    "a model in memory": ({"model": torch.nn.Linear(1, 1)}, "model was a Linear, expected a local"),
    "settings": ({"config": tppo.PPOConfig(length_alpha=1.0)},
                 "config.length_alpha was 1.0, expected the default: it belongs to the token rew"),
    "no model": ({"model": "absent/model"}, "absent/model"),
    "too long": ({"prompts": ["red shoes " * 60], "reward": lambda completions: []},
                 r"prompts\[0\]: the prompt has .* expected at most 58"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_runs(model, tmp_path, case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        door(changes.pop("model", model), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_run_of_stages_is_left_alone(model, tmp_path):
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(DataError, match="holds a run of stages"):
        door(model, tmp_path).train()


def test_every_public_name_is_there_for_readers_and_type_checkers():
    assert set(tppo.__all__) <= set(dir(tppo))
    for name in tppo.__all__:
        assert getattr(tppo, name).__name__ == name
    tree = ast.parse(Path(tppo.__file__).read_text())
    block, _ = (node for node in tree.body if isinstance(node, ast.If))
    typed = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert {home: sorted(names) for home, names in typed.items()} == {
        home: sorted(names) for home, names in tppo._HOMES.items()
    }
    assert sorted(tppo.__all__) == sorted(n for names in typed.values() for n in names)
    with pytest.raises(AttributeError, match=r"no attribute 'PPOTraner'; did you mean 'PPOTrainer"):
        tppo.PPOTraner  # noqa: B018
