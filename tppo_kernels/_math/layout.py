"""One prompt, many responses: the layout of a packed batch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._core.check import Check, describe
from .._core.derivatives import savable

ALIGNMENTS = ("logprob", "value", "reward", "bootstrap")
_PROMPT, _INNER, _LAST = 0, 1, 2  # the role of a token


class PrefixPlan(NamedTuple):
    """What attention takes of a layout; the letters and the tensors are those of PrefixLayout."""

    cu_segments: Tensor  # [S + 1] int32
    is_prompt: Tensor  # [S] bool
    prompts_first: Tensor  # [L] int64
    cu_shared: Tensor  # [2, B + 1] int32
    cu_responses: Tensor  # [M + 1] int32
    sizes: Tensor  # [4] int64, on the CPU


class PrefixAttentionCall(NamedTuple):
    """The arguments of a raw call of `prefix_attention`."""

    q: Tensor  # [Hq, L, D]
    k: Tensor  # [Hkv, L, D]
    v: Tensor  # [Hkv, L, Dv]
    plan: PrefixPlan
    scale: Tensor  # []


class PrefixAttentionGradient(NamedTuple):
    """The arguments of a raw call of its backward."""

    attention: PrefixAttentionCall
    grad: Tensor  # [Hq, L, Dv]
    out: Tensor  # [Hq, L, Dv]
    lse: Tensor  # [Hq, L], the logsumexps of the scores


class _Slots(NamedTuple):
    """Where the states of a layout's tokens go, for the backward of `response_states`."""

    mask: Tensor  # [M, R_max] bool
    slot: Tensor  # [L]
    role: Tensor  # [L]
    prompt_last: Tensor  # [B]
    group_sizes: Tensor  # [B]


class PrefixLayout:
    """Where the tokens of a packed batch lie: group by group *prompt, response_1, ..., response_G*.

    Letters: B groups, G responses of a group, M responses in all, S = B + M segments, L tokens,
    R_max the longest response. Made by `from_lengths`, and not changed after.

    prompt_lengths (P_1, ...) and response_lengths ((R_11, ..., R_1G), ...): whole numbers.
    position_ids: int64 [1, L], from 0 in each prompt and from P in each of its responses.
    response_mask: bool [M, R_max]. segment_lengths, is_prompt: [S], the segments in order.

    For attention of variable length: prompts_first int64 [L], the tokens of all prompts, then those
    of all responses; cu_segments [S + 1], cu_responses [M + 1] and cu_shared [2, B + 1], int32, the
    offsets of the segments in the batch, of the responses among theirs, and of all responses of a
    group and of its prompt; sizes int64 [4], on the CPU on every device: the tokens of prompts, the
    longest prompt, the longest response, the most response tokens of a group.
    """

    def __init__(self, prompt_lengths: tuple[int, ...],
                 response_lengths: tuple[tuple[int, ...], ...]):
        self.prompt_lengths, self.response_lengths = prompt_lengths, response_lengths
        segments = [(length, i == 0) for p, responses in zip(
            prompt_lengths, response_lengths, strict=True) for i, length in enumerate(
            (p, *responses))]
        lengths = torch.tensor([length for length, _ in segments], dtype=torch.int64)
        is_prompt = torch.tensor([prompt for _, prompt in segments], dtype=torch.bool)
        total, end = int(lengths.sum()), lengths.cumsum(0)
        segment = torch.repeat_interleave(lengths)  # [L]
        group = is_prompt.long().cumsum(0) - 1  # [S]
        prompts, responses = lengths[is_prompt], lengths[~is_prompt]  # [B], [M]
        behind = torch.where(is_prompt, 0, prompts[group])  # [S], the position of its first token
        inside = torch.arange(total) - (end - lengths)[segment]  # [L], the place in its segment
        width = int(responses.max()) if len(responses) else 0
        slot = torch.arange(width)
        response = (~is_prompt).long().cumsum(0) - 1  # [S]

        self.segment_lengths, self.is_prompt = lengths, is_prompt
        self.prompts_first = torch.argsort(~is_prompt[segment], stable=True)
        of_group = torch.tensor([sum(r) for r in response_lengths], dtype=torch.int64)  # [B]
        self.cu_segments, self.cu_responses = _offsets(lengths), _offsets(responses)
        self.cu_shared = _offsets(torch.stack([of_group, prompts]))
        self.sizes = torch.tensor([int(prompts.sum()), *(max(x.tolist(), default=0) for x in (
            prompts, responses, of_group))])
        self.group_sizes = torch.tensor([len(r) for r in response_lengths], dtype=torch.int64)
        self.position_ids = (behind[segment] + inside)[None]
        self.response_mask = slot < responses[:, None]
        self._first = (end - lengths)[~is_prompt]  # [M], the first token of each response
        self._response_length = responses
        self._prompt_last = end[is_prompt] - 1  # [B]
        self._before = self._prompt_last[group[~is_prompt]]  # [M], the token before the response
        self._slot = torch.where(is_prompt[segment], 0, response[segment] * width + inside)  # [L]
        last = inside == lengths[segment] - 1
        self._role = torch.where(is_prompt[segment], _PROMPT, torch.where(last, _LAST, _INNER))
        self._moved: dict[torch.device, PrefixLayout] = {}

    @classmethod
    def from_lengths(cls, prompt_lengths: Iterable[int] | Tensor,
                     response_lengths: Iterable[Iterable[int] | Tensor] | Tensor) -> PrefixLayout:
        """The layout of B prompts and the responses of each.

        prompt_lengths: B whole numbers >= 1, or a tensor [B]. response_lengths: for each prompt
        one or more whole numbers >= 1 (ragged), or a tensor [B, G]. A tensor's values are read
        on the host. On the device of `prompt_lengths`, the CPU for a list. Raises ValueError /
        TypeError that name the argument.
        """
        prompts = _lengths("prompt_lengths", prompt_lengths)
        if isinstance(response_lengths, str) or not isinstance(response_lengths, Iterable):
            raise TypeError(f"PrefixLayout: response_lengths is {describe(response_lengths)}, "
                            "expected the lengths of the responses of each prompt")
        responses = tuple(_lengths(f"response_lengths[{b}]", r)
                          for b, r in enumerate(response_lengths))
        if len(responses) != len(prompts):
            raise ValueError(f"PrefixLayout: response_lengths has {len(responses)} groups, "
                             f"expected {len(prompts)} as prompt_lengths")
        for b, lengths in enumerate(responses):
            if not lengths:
                raise ValueError(f"PrefixLayout: response_lengths[{b}] is empty, expected one or "
                                 "more responses a prompt; leave out a prompt without any")
        with torch.device("cpu"):  # whatever torch's default device is
            layout = cls(prompts, responses)
        return layout.to(prompt_lengths.device) if isinstance(prompt_lengths, Tensor) else layout

    @property
    def n_groups(self) -> int:
        """B."""
        return len(self.prompt_lengths)

    @property
    def n_responses(self) -> int:
        """M, over all groups."""
        return self.response_mask.shape[0]

    @property
    def n_tokens(self) -> int:
        """L, of prompts and responses."""
        return self.position_ids.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.position_ids.device

    def __repr__(self) -> str:
        return (f"PrefixLayout({self.n_groups} prompts, {self.n_responses} responses, "
                f"{self.n_tokens} tokens, on {self.device})")

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PrefixLayout:
        """The same layout on another device; itself where it lies there already.

        A second call for one device gives the same object, without a copy.
        """
        wanted = torch.device(device)
        if wanted == self.device:
            return self
        if wanted not in self._moved:
            tensors = {n: x.to(wanted, non_blocking=non_blocking)
                       for n, x in self.__dict__.items() if isinstance(x, Tensor)}
            tensors["sizes"] = self.sizes
            if tensors["position_ids"].device == self.device:  # "cuda" is where it lies
                return self
            moved = object.__new__(PrefixLayout)
            moved.__dict__.update({**self.__dict__, **tensors, "_moved": {}})
            self._moved[wanted] = moved
        return self._moved[wanted]

    def pack(self, prompts: Sequence[Any], responses: Sequence[Sequence[Any]]) -> Tensor:
        """The token ids of all groups, one after another.  # [1, L]

        prompts: B times the P_b ids of a prompt; responses: B times G_b times the ids of a
        response; each a list of whole numbers or an integer tensor of one dimension, without
        padding. int64, on the device of the tensors given, else on that of the layout.
        """
        if len(prompts) != self.n_groups or len(responses) != self.n_groups:
            raise ValueError(f"PrefixLayout.pack: prompts has {len(prompts)} and responses "
                             f"{len(responses)} groups, expected {self.n_groups} as the layout")
        pieces = []
        for b, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            lengths = self.response_lengths[b]
            if isinstance(group, Tensor) and group.dim() != 2 or len(group) != len(lengths):
                raise ValueError(f"PrefixLayout.pack: responses[{b}] is {describe(group)}, "
                                 f"expected {len(lengths)} responses as the layout")
            pieces.append(_ids(f"prompts[{b}]", prompt, self.prompt_lengths[b]))
            pieces += [_ids(f"responses[{b}][{i}]", ids, length)
                       for i, (ids, length) in enumerate(zip(group, lengths, strict=True))]
        given = {x.device for x in pieces if isinstance(x, Tensor)}
        if len(given) > 1:
            raise ValueError("PrefixLayout.pack: the ids are on several devices, "
                             f"{', '.join(sorted(map(str, given)))}, expected one")
        device = given.pop() if given else self.device
        flat = [torch.as_tensor(x, dtype=torch.int64, device=device) for x in pieces]
        return torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *flat])[None]

    def response_states(
            self,
            hidden: Tensor,  # [L, ...]
            align: str = "logprob",
    ) -> Tensor:
        """The states [M, R_max, ...] that belong to the tokens t = 0..R_max-1 of each response.

            align "logprob", "value"   the state before token t; for t = 0 the prompt's last
            align "reward"             the state at token t
            align "bootstrap"          the state at the last token of the response: [M, ...]

        hidden: [L, ...], states, values or (with "reward") token ids of the packed batch. 0 where
        `response_mask` is False. Keeps dtype and device. Differentiable in `hidden`, and
        deterministic: every state is used once, but a prompt's last one, whose G gradients are
        added in order.
        """
        check = Check("PrefixLayout.response_states")
        check.choice("align", align, ALIGNMENTS)
        if not isinstance(hidden, Tensor):
            raise TypeError("PrefixLayout.response_states: hidden is "
                            f"{describe(hidden)}, expected a tensor [L, ...]")
        if hidden.dim() == 0 or hidden.shape[0] != self.position_ids.shape[1]:
            raise ValueError(f"PrefixLayout.response_states: hidden has shape {list(hidden.shape)},"
                             f" expected [L, ...] with L = {self.n_tokens}"
                             + ("; pass hidden[0]" if hidden.shape[:1] == (1,) else ""))
        return self.to(hidden.device)._take(hidden, align)

    def _take(self, hidden: Tensor, align: str) -> Tensor:
        slots = _Slots(self.response_mask, self._slot, self._role, self._prompt_last,
                       self.group_sizes)
        return _ResponseStates.apply(hidden, self._index(align), align, *slots)

    def _index(self, align: str) -> Tensor:
        """The token whose state each slot takes."""  # [M, R_max], or [M] for "bootstrap"
        if align == "bootstrap":
            return self._first + self._response_length - 1
        token = self._first[:, None] + torch.arange(self.response_mask.shape[1], device=self.device)
        if align != "reward":
            token = torch.where(token == self._first[:, None], self._before[:, None], token - 1)
        return torch.where(self.response_mask, token, 0)


def _offsets(lengths: Tensor) -> Tensor:
    """int32, from 0 to the total, along the last dimension."""  # [..., n] -> [..., n + 1]
    return torch.nn.functional.pad(lengths.cumsum(-1), (1, 0)).int()


def _lengths(name: str, values: Any) -> tuple[int, ...]:
    """Whole numbers >= 1 from a sequence or a tensor of one dimension."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"PrefixLayout: {name} is {describe(values)}, expected whole numbers "
                             "in one dimension")
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"PrefixLayout: {name} is {describe(values)}, expected a sequence of "
                        "lengths")
    numbers = []
    for i, value in enumerate(values):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool):
            raise TypeError(f"PrefixLayout: {name}[{i}] is {describe(value)}, expected a whole "
                            "number")
        if number < 1:
            raise ValueError(f"PrefixLayout: {name}[{i}] is {number}, expected a length >= 1")
        numbers.append(number)
    return tuple(numbers)


def _ids(name: str, ids: Any, length: int) -> Any:
    """Checks that ids are `length` whole numbers in one dimension; gives them as they are."""
    if isinstance(ids, Tensor) and (ids.dim() != 1 or ids.is_floating_point()
                                    or ids.dtype == torch.bool):
        raise ValueError(f"PrefixLayout.pack: {name} is {describe(ids)}, expected whole numbers in "
                         "one dimension")
    if not isinstance(ids, Tensor):
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"PrefixLayout.pack: {name} is {describe(ids)}, expected token ids")
        ids = [operator.index(i) for i in ids]
    if len(ids) != length:
        raise ValueError(f"PrefixLayout.pack: {name} has {len(ids)} ids, expected {length} as the "
                         "layout")
    return ids


class _ResponseStates(torch.autograd.Function):
    """A gather in both directions, because each state but a prompt's last has at most one slot.

    There is no operator for it: a layout works in plain torch. Its gradient depends on no input,
    so that torch's own refusal of a second derivative is enough.
    """

    @staticmethod
    def forward(ctx, hidden, index, align, *slots):
        ctx.save_for_backward(*map(savable, slots))
        ctx.align, mask = align, slots[0]
        states = hidden[index]
        if align == "bootstrap":
            return states
        keep = mask.reshape(*mask.shape, *[1] * (hidden.dim() - 1))
        return torch.where(keep, states, states.new_zeros(()))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mask, slot, role, prompt_last, group_sizes = _Slots(*ctx.saved_tensors)
        responses, width = mask.shape
        inner = grad.shape[1 if ctx.align == "bootstrap" else 2:]
        total = grad.new_zeros(slot.shape[0], *inner)  # [L, ...]
        if responses:
            if ctx.align == "bootstrap":
                taken, rows = role == _LAST, grad[slot // width]
            elif ctx.align == "reward":
                taken, rows = role != _PROMPT, grad.reshape(-1, *inner)[slot]
            else:  # the state at a token is the one before the next
                taken = role == _INNER
                rows = grad.reshape(-1, *inner)[torch.where(taken, slot + 1, 0)]
                wide = grad[:, 0].to(torch.promote_types(grad.dtype, torch.float32))
                first = torch.segment_reduce(wide, "sum", lengths=group_sizes, unsafe=True)
                total = total.index_copy(0, prompt_last, first.to(grad.dtype))
            total = torch.where(taken.reshape(-1, *[1] * len(inner)), rows, total)
        return (total, *[None] * 7)
