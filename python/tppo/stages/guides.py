"""The guide that a configuration names, as the `Rollout` that writes beside the learner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.labels.endpoint.config import EndpointConfig, api_key, need_libraries, without_key
from tppo.labels.endpoint.forms import Action
from tppo.labels.endpoint.http import exchange, new_client
from tppo.labels.endpoint.replies import Trouble, completion_text
from tppo.labels.endpoint.retry import persistently
from tppo.methods.advantages import Advantage
from tppo.methods.config import Algorithm, RLGFConfig
from tppo.methods.ppo import PPO
from tppo.methods.rlgf import GuidedPPO
from tppo.models.config import GuideConfig, ModelConfig, Sampler
from tppo.models.folder import model_eos_ids
from tppo.models.guide import ModelWriter, TextGuide, Writer, Written
from tppo.models.hub import locate
from tppo.models.load import load_policy
from tppo.models.rollout import Engine, Rollout, Sampling, build
from tppo.models.tokenizer import load_tokenizer
from tppo.models.vocabulary import limit_vocabulary
from tppo.progress import say
from tppo.rewards import Questions

if TYPE_CHECKING:
    from tppo.stages.run import Run

GO_ON = (
    "\n\nThe beginning of the answer is written already. Write only what comes behind its last "
    "character, nothing of it again, and no remark. The beginning:\n{begun}"
)
QUERIES = (
    "You are given what a user of a search engine did, and a number. Answer with that number of "
    "search queries that this user is likely to type next, one a line, nothing else."
)


class Learner(NamedTuple):
    """What a guide has to know of the learner."""

    ref: PreTrainedModel
    """The model that it starts from, which guides where no other is named."""
    tokenizer: PreTrainedTokenizerBase
    eos_ids: Sequence[int]
    sampler: Sampler
    """Who samples, the guide's part too where it is a model of this process."""
    questions: Questions
    """What it is trained on."""
    encode: Callable[[PreTrainedTokenizerBase, Any], list[int]]
    """A prompt as the user gave it, in the tokens of a tokenizer."""


class Guided(NamedTuple):
    """An algorithm with the guide that it has; by default plain PPO, which has none."""

    algorithm: Algorithm = "ppo"
    guide: Rollout | None = None
    rlgf: RLGFConfig = RLGFConfig()
    config: GuideConfig = GuideConfig()

    def critics(self, advantage: Advantage) -> int:
        """How many of them the training needs."""
        return (2 if self.algorithm == "lols" else 1) if advantage.needs_critic else 0

    def trainer(self, *given: Any, **options: Any) -> PPO:
        """`PPO` of the algorithm."""
        if self.guide is None:
            return PPO(*given, **options)
        return GuidedPPO(
            *given, **options, algorithm=self.algorithm, guide=self.guide, rlgf=self.rlgf,
            guide_sampling=Sampling(1, self.config.temperature, top_p=self.config.top_p),
        )  # fmt: skip


UNGUIDED = Guided()


def guide_folder(config: GuideConfig, pickles: bool = False) -> Path | None:
    """The folder of --guide.model.  Errors: DataError where there is none."""
    if config.model is None:
        return None
    return locate(config.model, config.revision, flag="--guide.model", pickles=pickles)


def guide_of_run(run: Run) -> Path | None:
    """The folder of the guide that a run of stages reads, if it is one."""
    if run.config.algorithm == "ppo":
        return None
    return guide_folder(run.config.guide, run.config.model.allow_pickle)


def check_guide(config: GuideConfig) -> None:
    """What can be known before a model is loaded.

    Errors: ImportError without the libraries of an endpoint; ValueError for its address or key.
    """
    if config.base_url:
        need_libraries()
        api_key(_endpoint(config))


def new_guide(
    config: GuideConfig, learner: Learner, device: torch.device, loading: ModelConfig
) -> Rollout:
    """The guide: the reference, another model (in the learner's tokens where it has the same, else
    by text), or a model at an endpoint.
    """
    prompts = dict(zip(map(tuple, learner.questions.ids), learner.questions.prompts, strict=False))

    def by_text(write: Writer) -> TextGuide:
        return TextGuide(write, learner.tokenizer, learner.eos_ids, prompts)

    def engine(model: PreTrainedModel, pad_id: int, eos_ids: Sequence[int]) -> Engine:
        return build(model, learner.sampler, pad_id=pad_id, eos_id=eos_ids)

    if config.base_url:
        return by_text(EndpointWriter(config))
    folder = guide_folder(config, loading.allow_pickle)
    if folder is None:
        return engine(learner.ref, learner.tokenizer.pad_token_id, learner.eos_ids)
    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, device, loading.dtype, pickles=loading.allow_pickle)
    model = limit_vocabulary(model.requires_grad_(False), tokenizer)
    if tokenizer.get_vocab() == learner.tokenizer.get_vocab():
        return engine(model, learner.tokenizer.pad_token_id, learner.eos_ids)
    say(f"guide: {folder} has a tokenizer of its own: it reads the prompts as text, and what it "
        "writes is split into the learner's tokens")  # fmt: skip
    eos_ids = model_eos_ids(tokenizer, model)
    own = engine(model, tokenizer.pad_token_id, eos_ids)
    return by_text(ModelWriter(own, tokenizer, eos_ids, lambda p: learner.encode(tokenizer, p)))


class EndpointWriter:
    """A model behind an OpenAI-compatible endpoint as a guide's `Writer`.

    A request is tried again as the labeller's are (the table of docs/labelling-endpoints.md).  Once
    one is lost for good the others are not sent any more, for the step is not taken.
    """

    def __init__(self, config: GuideConfig):
        self.config, self.endpoint = config, _endpoint(config)
        self.key, self.answered = api_key(self.endpoint), False

    def __call__(
        self, prompts: Sequence[Any], begun: Sequence[str], sampling: Sampling
    ) -> list[Written | None]:
        """The endpoint's text for every row, None for those that it did not answer."""
        # In a thread of its own, where no other event loop runs, such as a notebook's.
        with ThreadPoolExecutor(1, "guide") as thread:
            return thread.submit(asyncio.run, self._all(prompts, begun, sampling)).result()

    async def _all(
        self, prompts: Sequence[Any], begun: Sequence[str], sampling: Sampling
    ) -> list[Written | None]:
        client, lost = new_client(self.endpoint, self.key), asyncio.Event()
        free = asyncio.Semaphore(self.config.concurrency)

        async def one(prompt: Any, start: str) -> Written | None:
            async with free:
                request = self.request(prompt, start, sampling)
                found = None if lost.is_set() else await self._asked(client, request, lost)
                if isinstance(found, Trouble):
                    lost.set()
                    reason = found.reason.replace("--label.endpoint.", "--guide.")
                    say(f"guide {self.config.name}: {without_key(reason, self.key)}")
                    return None
                if found is not None and start and found.text.startswith(start):
                    return found._replace(text=found.text[len(start) :])  # said once more
                return found

        try:
            rows = zip(prompts, begun, strict=True)
            return list(await asyncio.gather(*(one(*row) for row in rows)))
        finally:
            await client.close()

    def request(self, prompt: Any, begun: str, sampling: Sampling) -> dict[str, Any]:
        """The body of a chat completion that asks for the answer, or what is left of it."""
        text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if text else [dict(m) for m in prompt]
        if begun:
            last = messages[-1]
            messages[-1] = {**last, "content": last["content"] + GO_ON.format(begun=begun)}
        if self.config.system:
            messages.insert(0, {"role": "system", "content": self.config.system})
        return {"model": self.config.name, "messages": messages, "top_p": sampling.top_p,
                "temperature": sampling.temperature,
                "max_tokens": sampling.max_new_tokens}  # fmt: skip

    async def _asked(
        self, client: Any, request: dict[str, Any], lost: asyncio.Event
    ) -> Written | Trouble | None:
        """The text of one reply, tried again where that can help; None where others were lost."""

        async def attempt() -> tuple[Written | Trouble | None, Action]:
            if lost.is_set():
                return None, "drop"
            found = completion_text(await exchange(client, request), self.endpoint)
            if isinstance(found, Trouble):
                return found, found.form.action(self.answered)
            self.answered = True
            return Written(found[0], found[1] != "length"), "label"

        async def pause(seconds: float, _: Trouble) -> None:
            try:
                await asyncio.wait_for(lost.wait(), seconds)
            except asyncio.TimeoutError:
                pass

        return (await persistently(attempt, self.endpoint, pause))[0]


def _endpoint(config: GuideConfig) -> EndpointConfig:
    return EndpointConfig(
        base_url=config.base_url, model=config.name, api_key_env=config.api_key_env,
        concurrency=config.concurrency, max_retries=config.max_retries, timeout_s=config.timeout_s,
    )  # fmt: skip
