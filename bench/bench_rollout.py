"""Answers of 24 and of 400 tokens, by every engine that can sample them: tokens a second.

    generate             transformers' `generate` on the cache that grows, as it stands
    HFRollout            the same in batches that rows leave when they have ended: the trainer's
    static, compiled     `generate` on a static cache, its step compiled
    continuous batching  transformers' `generate_batch` on pages of keys and values
    vLLM                 the trainer's engine of `--rollout vllm`, where it is installed

The model of the demo has two heads here, in place of as many as give each 16 numbers: on a CPU
vLLM takes multiples of 32.  It has as many parameters as the demo's.

Greedy answers, several to a prompt, which end here and there.  Before anything is timed each engine
has to give the answers of `generate`; one that leaves them is excused where the two tokens are as
likely as each other to within a rounding.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from _harness import Attempts, RedGate
from _journal import Journal
from _machine import wait
from _rollouts import RolloutRow

pytest.importorskip("transformers")
from bench_step import MODELS, settings_of  # noqa: E402
from transformers import (  # noqa: E402
    CompileConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tppo.models.batch import pad  # noqa: E402
from tppo.models.rollout import HFRollout, Sampling  # noqa: E402

CAPS = (24, 400)
PAD, GROUP = 0, 4  # answers to a prompt
PROMPTS = {"demo": 64, "135M": 8, "1.5B": 64}
MODELS_OF = {"cpu": ("demo", "135M"), "cuda": ("1.5B",)}
LONG_ON = {"cpu": ("demo",), "cuda": ("1.5B",)}  # else only with --bench-grid: it takes minutes
SHAPES = MODELS | {
    "demo": {**MODELS["demo"], "num_attention_heads": 2, "num_key_value_heads": 2},  # for vLLM
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}
SHARP = 4.0  # standard deviation of the logits
ENDS = 97  # one id of so many ends an answer
TIES = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # in nats, what is a tie
PEER_S = 120  # an engine starts, compiles and answers in so long
Answers = list[list[int]]


@dataclass(frozen=True)
class Work:
    """A model, what it is asked, and how long its answers may be."""

    name: str
    model: PreTrainedModel
    prompts: list[list[int]]
    eos_ids: list[int]
    cap: int
    compiled: bool = True

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return self.model.device.type

    def config(self, **more: Any) -> GenerationConfig:
        """Of greedy answers."""
        return GenerationConfig(do_sample=False, max_new_tokens=self.cap, pad_token_id=PAD,
                                eos_token_id=self.eos_ids, **more)

    def answers(self, rows: Answers) -> Answers:
        """The rows up to their ends."""
        ends = set(self.eos_ids)
        return [row[:next((i for i, t in enumerate(row, 1) if t in ends), self.cap)]
                for row in rows]


def work_of(name: str, cap: int, prompts: int, device: str, compiled: bool = True) -> Work:
    """Random weights that make much of the context, and tell the likeliest token from the next."""
    torch.manual_seed(0)
    settings = {**settings_of("demo"), **SHAPES[name], "tie_word_embeddings": False}
    settings["initializer_range"] = settings["hidden_size"] ** -0.5
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.lm_head.weight *= SHARP
    g, vocab = torch.Generator().manual_seed(1), settings["vocab_size"]
    lengths = torch.randint(60, 250, (-(-prompts // GROUP),), generator=g).tolist()
    asked = [torch.randint(3, vocab, (n,), generator=g).tolist() for n in lengths]
    eos_ids = torch.randperm(vocab - 3, generator=g)[:vocab // ENDS].add(3).tolist()
    return Work(name, model, [p for p in asked for _ in range(GROUP)][:prompts], eos_ids, cap,
                compiled)


def by_generate(work: Work, **more: Any) -> Answers:
    """transformers' `generate`, all rows to the end of the longest."""
    batch = pad(work.prompts, [[] for _ in work.prompts], PAD, work.model.device)
    found = work.model.generate(  # type: ignore[operator]
        input_ids=batch.input_ids, attention_mask=batch.attention_mask,
        generation_config=work.config(**more))
    return work.answers(found[:, batch.prompt_length:].tolist())


def by_trainer(work: Work) -> Answers:
    """The trainer's."""
    engine = HFRollout(work.model, pad_id=PAD, eos_id=work.eos_ids)
    return engine.generate(work.prompts, Sampling(work.cap, 0.0)).response_ids


def by_static(work: Work) -> Answers:
    """A static cache, its step compiled, on a CPU too."""
    if not work.compiled:
        return by_generate(work, cache_implementation="static", disable_compile=True)
    compiling = CompileConfig(fullgraph=False,
                              mode="default" if work.device == "cpu" else "reduce-overhead")
    compiling._compile_all_devices = True
    return by_generate(work, cache_implementation="static", compile_config=compiling)


def by_pages(work: Work) -> Answers:
    """Continuous batching; the model has its own attention again when this returns."""
    from transformers.generation import ContinuousBatchingConfig

    page, rows = 64, len(work.prompts)
    blocks = rows * (-(-(max(map(len, work.prompts)) + work.cap) // page) + 1)
    pages = ContinuousBatchingConfig(
        page_size=page, num_blocks=blocks, max_batch_tokens=max(1024, rows),
        max_requests_per_batch=rows)
    attention = work.model.config._attn_implementation
    found = work.model.generate_batch(  # type: ignore[operator]
        work.prompts, work.config(), pages, warmup=work.device != "cpu")
    if work.model.config._attn_implementation != attention:
        raise RuntimeError(f"the model's attention stayed {work.model.config._attn_implementation}")
    if failed := [one.error for one in found.values() if one.error]:
        raise RuntimeError(f"{len(failed)} of {rows} requests failed: {failed[0]}")
    return work.answers([one.generated_tokens for one in found.values()])


def vllm_of(work: Work) -> Callable[[Work], Answers]:
    """The trainer's engine, up and with the model's weights."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("vllm is not installed")
    from tppo.models.config import Sampler
    from tppo.models.rollout import build

    engine = build(work.model, Sampler("vllm"), pad_id=PAD, eos_id=work.eos_ids)
    return lambda work: engine.generate(work.prompts, Sampling(work.cap, 0.0)).response_ids


OURS: dict[str, Callable[[Work], Answers]] = {"generate": by_generate, "HFRollout": by_trainer}
# The rest may fail where they like; those that start slowly come last.
PEERS: dict[str, Callable[[Work], Callable[[Work], Answers]]] = {
    "continuous batching": lambda work: by_pages, "vLLM": vllm_of,
    "static, compiled": lambda work: by_static}


@torch.no_grad()
def excused(work: Work, expected: Answers, found: Answers) -> int:
    """How many answers leave the expected ones at a tie.

    Raises AssertionError where one does elsewhere.
    """
    apart = [i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    for i in apart:
        pairs = enumerate(zip(expected[i], found[i], strict=False))
        at = next((t for t, (a, b) in pairs if a != b), None)
        if at is None:
            raise AssertionError(f"answer {i} has {len(found[i])} tokens, expected "
                                 f"{len(expected[i])}")
        ids = torch.tensor([work.prompts[i] + expected[i][:at]], device=work.model.device)
        scores = work.model(ids).logits[0, -1].float().log_softmax(-1)
        gap = float(scores[expected[i][at]] - scores[found[i][at]])
        if not abs(gap) <= TIES[work.model.dtype]:
            raise AssertionError(f"answer {i} has token {found[i][at]} at {at}, expected "
                                 f"{expected[i][at]}, which is likelier by {gap:.2g} nats")
    return len(apart)


def measure(work: Work, rounds: int, attempts: Attempts) -> list[RolloutRow]:
    """The engines that agree with `generate`, timed in turn; the others' rows say why they are
    not."""
    attempts.about("")
    engines = dict(OURS)
    expected, ties = by_generate(work), {"generate": 0}
    try:
        ties["HFRollout"] = excused(work, expected, by_trainer(work))
    except AssertionError as error:
        raise RedGate(f"red gate, no number: HFRollout: {error}") from None
    for name, start in PEERS.items():
        if name in attempts.refused:  # it has ended a process before
            continue

        def gated(start: Any = start, name: str = name) -> Callable[[Work], Answers]:
            engine = start(work)
            ties[name] = excused(work, expected, engine(work))
            return engine

        if (engine := attempts.peer(name, gated)) is not None:
            engines[name] = engine
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tokens: dict[str, int] = {}
    for _ in range(rounds):
        for name in list(engines):
            wait(work.device)
            start_s = time.perf_counter()
            found = attempts.peer(name, lambda: engines[name](work))  # noqa: B023
            wait(work.device)
            if found is None:
                del engines[name]
                continue
            seconds[name].append(time.perf_counter() - start_s)
            tokens[name] = sum(map(len, found))
    return rows_of(work, {n: seconds[n] for n in engines}, tokens, ties, attempts.refused)


def rows_of(work: Work, seconds: dict[str, list[float]], tokens: dict[str, int],
            ties: dict[str, int], refused: dict[str, str]) -> list[RolloutRow]:
    """The rows, those without numbers last."""
    given = (work.name, work.device, len(work.prompts), work.cap)
    rate = {name: tokens[name] / median(took) for name, took in seconds.items()}
    return [*(RolloutRow(*given, name, tokens[name], round(median(seconds[name]), 3),
                         round(each, 1), round(each / rate["generate"], 2), ties[name])
              for name, each in rate.items()),
            *(RolloutRow(*given, name, None, None, None, None, note=why)
              for name, why in refused.items())]


def unit_of(name: str, cap: int) -> str:
    """What a journal calls one set of answers."""
    return f"rollout {name} {cap}"


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("size", range(2), ids=("small", "large"))
def test_rollout(rollouts, device, smoke, goals_only, journal: Journal | None, size, cap, request):
    if size >= len(MODELS_OF[device]) or (smoke and size):
        pytest.skip("fewer models on this device")
    if goals_only:
        pytest.skip("no goal")
    name = "demo" if smoke else MODELS_OF[device][size]
    if cap > CAPS[0] and name not in LONG_ON[device] and not (
            request.config.getoption("--bench-grid")):
        pytest.skip("minutes: --bench-grid")
    unit = unit_of(name, cap)
    if journal and journal.of("unit", unit=unit, state="ok"):
        pytest.skip("measured before")
    work = (work_of(name, min(cap, 30), 8, device, compiled=False) if smoke else
            work_of(name, cap, PROMPTS[name], device))
    attempts = Attempts(unit, device, journal, peer_seconds=PEER_S)
    if journal:
        attempts.refused |= {r["who"]: f"no number: {r['why']}"
                             for r in journal.of("broken", unit=unit) if r["who"]}
    rounds = 1 if smoke else min(3, request.config.getoption("--bench-rounds"))
    try:
        rows = measure(work, rounds, attempts)
    finally:
        attempts.end()
    rollouts(rows)
    if journal:
        journal.add("unit", part="rollouts", unit=unit, state="ok", said="")
    found = {row.engine: row for row in rows}
    assert {"generate", "HFRollout"} <= set(found) == {*OURS, *PEERS}
    assert smoke or cap == CAPS[0] or found["HFRollout"].speed_up > 1
