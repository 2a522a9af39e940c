"""`tppo doctor --model M`: what the model itself gives, read in every way of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tppo_kernels as tk
from tppo.models.batch import Batch
from tppo.models.guards import GuardError, trainable
from tppo.models.policy import policy_head, policy_logprobs, policy_states
from tppo.models.precision import relative_rms, rounding_error
from tppo.models.preflight import SHARED_TO, UNFIT
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.vocabulary import check_embeddings

TEXTS = ("search: red shoes for children\nsearch: boots\n", "search: hat\n")
ANSWERS, TOKENS = 3, 8  # to each text, and of each answer
HEADS = ("reference", "chunked", "cpp", "triton")
ATTENTIONS = ("reference", "efficient", "flash", "flash_attn", "flash_attn_3")
FIT = "ok"
DENSE = "each answer is read with a prompt of its own"


class Finding(NamedTuple):
    """A way of reading, how far it is off, what is allowed, and what follows."""

    check: str
    error: str
    bound: str
    verdict: str  # FIT, FIT and a note behind a colon, or what to do

    @property
    def good(self) -> bool:
        """Whether the model may be read so."""
        return self.verdict.partition(":")[0] == FIT


class Bounds(NamedTuple):
    """How far two readings of a model may lie apart."""

    exact: bool  # float32: the largest error; 16 bits: `relative_rms`
    forward: float
    backward: float

    def error(self, found: Tensor, expected: Tensor) -> float:
        """The distance of what was found, as the bounds measure it."""
        if not self.exact:
            return relative_rms(found, expected)
        largest = max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)
        return (found - expected).abs().max().item() / largest


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Short answers are sampled and read again: twice, by transformers alone, as PPO's update
    reads them, with shared prompts, on every backend.  The model is left as it is.
    """
    pad = tokenizer.pad_token_id
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS for _ in range(ANSWERS)]
    try:
        check_embeddings(tokenizer, model, max(map(max, prompts)))
    except ValueError as error:
        return [Finding("tokens of its tokenizer", "", "", f"do not train it: {error}")]
    exact = model.dtype == torch.float32
    bounds = Bounds(exact, *((SHARED_TO,) * 2 if exact else
                             (rounding_error(model), rounding_error(model, 2))))  # fmt: skip
    try:
        sampled = HFRollout(model, pad_id=pad, eos_id=[], prefix="dense").generate(
            prompts, Sampling(TOKENS), description="doctor"
        )
        batch = Batch(prompts, sampled.response_ids, pad, model.device, "dense")
        with torch.no_grad():
            old = policy_logprobs(model, batch, 1.0)[0]  # [B, T]
    except (*UNFIT, GuardError) as error:
        return [Finding("answers with dense prompts", "", "", f"do not train it: {_why(error)}")]
    return [*_dense(model, batch, old, bounds), *_shared(model, batch, old, bounds),
            *_heads(model, batch, old, bounds)]  # fmt: skip


def _dense(model: PreTrainedModel, batch: Batch, old: Tensor, bounds: Bounds) -> list[Finding]:
    twice = Bounds(True, 0.0, 0.0)
    rows = [*range(0, len(batch.response_ids), 2), *range(1, len(batch.response_ids), 2)]
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    def update() -> Tensor:
        """As in PPO's update: other rows together, in another order."""
        found = torch.zeros_like(old)
        for half in halves:
            part = batch.rows(half)
            found[half, : part.targets.shape[1]] = policy_logprobs(model, part, 1.0)[0]
        return found

    with torch.no_grad():
        return [
            _row("the same batch, read twice", lambda: policy_logprobs(model, batch, 1.0)[0], old,
                 twice, 0.0, "do not train it: something random is in its forward (dropout?)"),
            _row("step-0 ratio: as the update reads it", update, old, bounds, bounds.forward,
                 "do not train it: other rows of a batch, or padding, change its log-probs"),
            _row("one answer alone, by transformers", lambda: _alone(model, batch), old, bounds,
                 bounds.forward, "do not train it: padding, or a head that is no linear map, "
                 "changes its log-probs"),
        ]  # fmt: skip


def _alone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probs from the model's own logits, an answer at a time and without padding, [B, T]."""
    found = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for row, (prompt, answer) in enumerate(zip(batch.prompt_ids, batch.response_ids, strict=True)):
        ids = torch.tensor([[*prompt, *answer]], device=batch.mask.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        found[row, : len(answer)] = chosen[:, 0]
    return found


def _shared(model: PreTrainedModel, batch: Batch, old: Tensor, bounds: Bounds) -> list[Finding]:
    way = Batch(batch.prompt_ids, batch.response_ids, batch.pad_id, batch.device, "shared")
    remedy = "train with --prefix dense"
    responses = [[*way.response_ids[k : k + ANSWERS]]
                 for k in range(0, len(way.response_ids), ANSWERS)]  # fmt: skip
    prompts = [*way.prompt_ids[::ANSWERS]]
    layout = tk.PrefixLayout.from_lengths(map(len, prompts), [map(len, r) for r in responses])
    layout, packed = layout.to(way.device), layout.pack(prompts, responses).to(way.device)
    try:
        with tk.shared_prefix(model.base_model, layout):
            pass
    except ValueError as error:  # a training reads them dense then, and says so
        why = str(error).removeprefix("shared_prefix: ")
        return [Finding("shared prompts", "", "", f"{FIT}: {DENSE}, because {why}")]

    def gradients(of: Batch) -> Tensor:
        output = policy_logprobs(model, of, 1.0)[0].sum()
        found = torch.autograd.grad(output, trainable(model), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    with torch.no_grad():
        rows = [_row("shared prompts, log-probs", lambda: policy_logprobs(model, way, 1.0)[0], old,
                     bounds, bounds.forward, remedy)]  # fmt: skip
    if trainable(model):
        dense = gradients(batch)
        rows.append(_row("shared prompts, gradients", lambda: gradients(way), dense, bounds,
                         bounds.backward, remedy))  # fmt: skip

    def by_backend(name: str) -> Tensor:
        with tk.shared_prefix(model.base_model, layout), tk.use_backend(name):
            hidden = model.base_model(input_ids=packed, use_cache=False).last_hidden_state[0]
        states = layout.response_states(hidden, "logprob")
        return policy_head(model)(states, way.targets, way.mask)[0]

    for name in ATTENTIONS:
        try:
            with torch.no_grad():
                found = by_backend(name)
        except (tk.BackendError, *UNFIT):  # not here, or a row above says what is wrong
            continue
        rows.append(_row(f"shared attention, backend {name}", found.clone, old, bounds,
                         bounds.forward, remedy))  # fmt: skip
    return rows


def _heads(model: PreTrainedModel, batch: Batch, old: Tensor, bounds: Bounds) -> list[Finding]:
    """The log-probs of the head by each backend that is here."""
    with torch.no_grad():
        states, head = policy_states(model, batch), policy_head(model)
        rows = []
        for name in HEADS:
            try:
                with tk.use_backend(name):
                    found = head(states, batch.targets, batch.mask)[0]
            except tk.BackendError:
                continue
            rows.append(_row(f"head, backend {name}", found.clone, old, bounds,
                             bounds.forward, f"not backend {name}: TPPO_BACKEND=reference goes "
                             "on without it"))  # fmt: skip
    return rows


def _row(check: str, read: Callable[[], Tensor], expected: Tensor, bounds: Bounds, limit: float,
         remedy: str) -> Finding:  # fmt: skip
    try:
        error = bounds.error(read(), expected)
    except UNFIT as failed:
        return Finding(check, "", "", f"{remedy} ({_why(failed)})")
    good = error <= limit  # NaN is not
    return Finding(check, f"{error:.1e}", f"{limit:.1e}" if limit else "0", FIT if good else remedy)


def _why(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def table(findings: list[Finding]) -> list[str]:
    """The findings in columns, and a sentence that says what to trust."""
    rows = [("check", "error", "allowed", "verdict"), *findings]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
             for row in rows]  # fmt: skip
    bad = list(dict.fromkeys(row.verdict.split(" (")[0] for row in findings if not row.good))
    told = "; ".join(bad) if bad else "every way of reading agrees: train it as you like"
    if not bad and any(DENSE in row.verdict for row in findings):
        told += f"; {DENSE}"
    return [*lines, f"what to trust: {told}"]
