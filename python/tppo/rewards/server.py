"""The server of a token reward model: what it is asked, and how it is known.

A request is of token ids, and the reply of class logits.  Every request begins with the short text
of which the reward model's export says how it is classified (`reward_probe.json`): a server that
was started again with other weights pays no reward.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tppo.errors import DataError
from tppo.labels.endpoint.config import EndpointConfig, api_key, need_libraries, without_key
from tppo.labels.endpoint.forms import Action
from tppo.labels.endpoint.http import exchange_json, new_http
from tppo.labels.endpoint.replies import V1_HINT, Trouble, object_of
from tppo.labels.endpoint.retry import persistently
from tppo.models.batch import Batch
from tppo.models.config import RewardServerConfig
from tppo.models.load import CLASSES
from tppo.models.own_tokens import load_own_tokenizer
from tppo.models.precision import relative_rms
from tppo.models.probe import Probe, read_probe
from tppo.progress import say

EXACT, ROUNDED = 1e-3, 0.1  # relative errors of class logits: of float32, and of 16-bit weights
SPREAD = 2_000  # tokens of the vocabulary that a server spells back
START = ("python -m vllm.entrypoints.openai.api_server --model {folder} --runner pooling "
         "--pooler-config '{{\"task\": \"token_classify\"}}'")  # fmt: skip


class RewardServerError(RuntimeError):
    """The server of the reward model gave nothing that could be paid; the message says what."""


class Connection(NamedTuple):
    """To a server, for the requests of one call, which share it."""

    client: Any  # of `new_http`
    endpoint: EndpointConfig


class Served(NamedTuple):
    """What a server says of the model that it has."""

    name: str
    longest: int | None  # tokens that it reads at once, where it says so


class RewardServer(nn.Module):
    """Class logits of a token reward model, from a server that speaks vLLM's `/pooling`.

    config: where it is, and how it is asked.  folder: the export of the reward model that is to be
    served there; only its tokenizer and `reward_probe.json` are read.

    Errors: DataError for an address or a folder that cannot be; RewardServerError where the server
    is not there, or has another model or tokenizer.
    """

    def __init__(self, config: RewardServerConfig, folder: str | Path):
        super().__init__()
        self.config, self.folder = config, Path(folder)
        try:
            self.endpoint = as_endpoint(config)
            self.probe: Probe = read_probe(folder)
            self.tokenizer: PreTrainedTokenizerBase = load_own_tokenizer(folder)
        except ValueError as error:
            raise DataError(f"the reward server: {_named(str(error))}") from None
        if self.probe.own_tokens:
            raise DataError(f"{folder}: this reward model reads text with a tokenizer of its own, "
                            "expected one that reads the policy's tokens, which a server is asked "
                            "for: `tppo train-rm` without --reward-model.model")  # fmt: skip
        if self.tokenizer.encode(self.probe.text, add_special_tokens=False) != self.probe.ids:
            raise DataError(f"{folder}: its tokenizer does not give the ids of its "
                            "reward_probe.json: it is not the reward model's own")  # fmt: skip
        self.answered, self.away = False, False
        self.limit = ROUNDED
        self.served = self._first_look()

    @property
    def mark(self) -> str:
        """Changes where the reward model does, and not with the server's address."""
        text = json.dumps([self.probe.ids, self.probe.logits])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def forward(self, batch: Batch) -> Tensor:
        """Class logits at each response token, [B, T, 3] float32; 0 where masked.

        Errors: RewardServerError where the server stays away, or gives what is no such reply.
        """
        rows = [[*prompt, *response] for prompt, response in
                zip(batch.prompt_ids, batch.response_ids, strict=True)]  # fmt: skip
        self.check_length(max(map(len, rows)))
        parts = list(_parts(list(map(len, rows)), self.config.max_tokens))
        work = [partial(self._logits, [rows[i] for i in part]) for part in parts]
        found = self._run(self.endpoint, work)
        logits = torch.zeros(*batch.mask.shape, len(CLASSES))
        for part, each in zip(parts, found, strict=True):
            for i, row in zip(part, each, strict=True):
                own = len(batch.response_ids[i])
                logits[i, :own] = row[len(row) - own :]
                if not bool(row[len(row) - own :].isfinite().all()):
                    raise self._error(f"class logits of answer {i} are not finite, expected "
                                      "numbers: its weights or its type are broken")  # fmt: skip
        return logits.to(batch.device)

    def check_length(self, longest: int) -> None:
        """Errors: DataError where the server cannot read so many tokens at once."""
        most = self.served.longest
        if most is not None and longest > most:
            raise DataError(
                f"the reward server {self.config.base_url} reads at most {most} tokens, and prompt "
                f"and answer have {longest}: start it with --max-model-len {longest} or more"
            )

    def check_policy(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Errors: DataError where a policy has other tokens than the reward model reads."""
        same = tokenizer.get_vocab() == self.tokenizer.get_vocab()
        if not same or tokenizer.encode(self.probe.text, add_special_tokens=False) != (
            self.probe.ids
        ):
            raise DataError(f"{self.folder}: the tokenizer of this reward model is not the "
                            "policy's, whose tokens a server is asked for; expected one that was "
                            "trained on the policy's own tokens")  # fmt: skip

    def _first_look(self) -> Served:
        """The model of the server, after a check that it is the one of the folder."""
        once = replace(self.endpoint, max_retries=0)
        (served,) = self._run(once, [self._model])
        self.served = served
        self.endpoint, once = (replace(x, model=served.name) for x in (self.endpoint, once))
        self._run(once, [self._check_tokenizer])
        ((row,),) = self._run(once, [partial(self._asked, [self.probe.ids])])
        error = self._check_probe(row)
        self.limit = EXACT if error < EXACT else ROUNDED
        if error >= EXACT:
            say(f"reward server {self.config.base_url}: its class logits are off by {error:.1e} "
                f"(relative) from those of {self.folder}, as those of 16-bit weights are")
        return served

    async def _model(self, server: Connection) -> Served:
        found = await self._object("/v1/models", None, server)
        given = found.get("data")
        models = [m for m in given if isinstance(m, dict)] if isinstance(given, list) else []
        names = [str(model.get("id")) for model in models]
        name = self.config.name or (names[0] if len(names) == 1 else "")
        if name not in names:
            asked = f"no model {name!r}" if name else f"{len(names)} models"
            raise self._error(f"it has {asked}, expected --reward-server.name to be one of "
                              f"{', '.join(names) or 'its models'}")  # fmt: skip
        longest = models[names.index(name)].get("max_model_len")
        return Served(name, longest if type(longest) is int else None)

    async def _check_tokenizer(self, server: Connection) -> None:
        """The server's tokenizer gives the ids of ours, for a text with much of its vocabulary."""
        size = len(self.tokenizer)
        spread = range(0, size, max(1, size // SPREAD))
        text = self.probe.text + "\n" + " ".join(
            str(self.tokenizer.decode([i])) for i in spread
        )
        own = self.tokenizer.encode(text, add_special_tokens=False)
        request = {"model": self.served.name, "prompt": text, "add_special_tokens": False}
        found = (await self._object("/tokenize", request, server)).get("tokens")
        if found != own:
            raise self._error(f"it has another tokenizer than {self.folder}: of a text with "
                              f"{len(own)} tokens it makes others; {self._start()}")  # fmt: skip

    async def _logits(self, rows: Sequence[Sequence[int]], server: Connection) -> list[Tensor]:
        """Class logits of all tokens of each row, [L, 3], of the model that was there at first."""
        probe, *found = await self._asked([self.probe.ids, *rows], server)
        self._check_probe(probe)
        return found

    def _check_probe(self, found: Tensor) -> float:
        """How far class logits of the short text are from the export's, relative.

        Errors: RewardServerError where it is another model that gave them.
        """
        expected = torch.tensor(self.probe.logits)  # [L, 3]
        error = relative_rms(found, expected)
        if error < self.limit:
            return error
        shares = relative_rms(found, expected.softmax(-1)) < ROUNDED
        why = ("it gives probabilities where class logits were asked for (use_activation): a newer "
               "vLLM knows that" if shares else "it has other weights")  # fmt: skip
        raise self._error(f"it is not the reward model of {self.folder}: of a short text its class "
                          f"logits are off by {error:.1e} (relative), expected < {self.limit:.0e}; "
                          f"{why}; {self._start()}")  # fmt: skip

    async def _asked(self, rows: Sequence[Sequence[int]], server: Connection) -> list[Tensor]:
        """What the server replies to rows of ids: for each [L, 3]."""
        request = {
            "model": self.served.name, "task": "token_classify", "input": [[*r] for r in rows],
            "add_special_tokens": False, "use_activation": False, "encoding_format": "base64",
            "embed_dtype": "float32", "endianness": "little",
        }  # fmt: skip
        given = (await self._object("/pooling", request, server)).get("data")
        if not isinstance(given, list) or len(given) != len(rows):
            count = f"{len(given)} entries" if isinstance(given, list) else "no list"
            raise self._error(f"its reply has {count} in `data`, expected {len(rows)}: one a row")
        placed = {one.get("index"): one.get("data") for one in given if isinstance(one, dict)}
        return [self._table(placed.get(i), len(row), i) for i, row in enumerate(rows)]

    def _table(self, text: Any, length: int, place: int) -> Tensor:
        """[L, 3] from base64."""
        try:
            raw = base64.b64decode(text, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise self._error(f"entry {place} of its reply is no base64 text, expected the class "
                              "logits in it (encoding_format base64)") from None  # fmt: skip
        if len(raw) != length * len(CLASSES) * 4:
            classes = len(raw) / (4 * length)
            raise self._error(
                f"entry {place} of its reply holds {len(raw)} bytes, {classes:g} numbers for each "
                f"of {length} tokens, expected {len(CLASSES)}: {', '.join(CLASSES)}"
            )
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(length, len(CLASSES))

    async def _object(
        self, path: str, body: dict[str, Any] | None, server: Connection
    ) -> dict[str, Any]:
        """The JSON object that one request gives, tried again as a labeller's is."""
        client, endpoint = server

        async def attempt() -> tuple[dict[str, Any] | Trouble, Action]:
            url = endpoint.base_url.removesuffix("/v1") + path
            found = object_of(await exchange_json(client, url, api_key(endpoint), body), endpoint)
            if isinstance(found, Trouble):
                return found, found.form.action(self.answered)
            if self.away:
                self.away = False
                say(f"reward server {endpoint.base_url}: answers again")
            self.answered = True
            return found, "label"

        async def pause(seconds: float, trouble: Trouble) -> None:
            if not self.away:
                self.away = True
                say(f"reward server {endpoint.base_url}: {_named(trouble.reason)}; tried again, "
                    f"up to {endpoint.max_retries} times")  # fmt: skip
            await asyncio.sleep(seconds)

        result, _ = await persistently(attempt, endpoint, pause)
        if isinstance(result, Trouble):
            reason = without_key(_named(result.reason), api_key(endpoint))
            raise self._error(f"{reason}; {self._start()}")
        return result

    def _run(
        self, endpoint: EndpointConfig, work: Sequence[Callable[[Connection], Any]]
    ) -> list[Any]:
        """The results of what asks a server, some at once, over connections that they share.

        In a thread where no other event loop runs.
        """

        async def all_of_it() -> list[Any]:
            free = asyncio.Semaphore(self.config.concurrency)

            async def one(each: Callable[[Connection], Any]) -> Any:
                async with free:
                    return await each(server)

            async with new_http(endpoint) as client:
                server = Connection(client, endpoint)
                return list(await asyncio.gather(*map(one, work)))

        with ThreadPoolExecutor(1, "reward-server") as thread:
            return thread.submit(asyncio.run, all_of_it()).result()

    def _error(self, what: str) -> RewardServerError:
        return RewardServerError(f"the reward server {self.config.base_url}: {what}")

    def _start(self) -> str:
        return f"this starts one: {START.format(folder=self.folder)}"


def as_endpoint(config: RewardServerConfig) -> EndpointConfig:
    """The server as the code of endpoints knows one.

    Errors: ImportError without the libraries; ValueError for an address or key that cannot be.
    """
    need_libraries()
    endpoint = EndpointConfig(
        base_url=config.base_url.rstrip("/"), model=config.name, api_key_env=config.api_key_env,
        concurrency=config.concurrency, max_retries=config.max_retries, timeout_s=config.timeout_s,
    )  # fmt: skip
    api_key(endpoint)
    return endpoint


def _named(text: str) -> str:
    """A message of the labeller's with our flags in it; an address is taken with /v1 and without.
    """
    return text.replace("--label.endpoint.", "--reward-server.").replace(V1_HINT, "")


def _parts(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in order, in parts of at most so many tokens, or of one row."""
    parts: list[list[int]] = []
    total = 0
    for i, length in enumerate(lengths):
        if not parts or total + length > most:
            parts.append([])
            total = 0
        parts[-1].append(i)
        total += length
    return parts
