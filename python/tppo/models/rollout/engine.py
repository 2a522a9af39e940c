"""vLLM in the process of the trainer: how it starts, gets the trainer's weights, and is asked.

This file alone knows vLLM's own names, and imports it where an engine is wanted.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tppo.errors import DataError
from tppo.models.adapters import adapter_settings, has_adapter, save_adapter, unadapted
from tppo.models.config import VLLMConfig
from tppo.models.folder import tied_key, without_generation_settings
from tppo.models.guards import trainable
from tppo.models.memory import kept_nbytes
from tppo.models.precision import dtype_name
from tppo.models.vocabulary import phantoms

CPU_BLOCK = 32  # tokens; the smallest block of keys and values there
CPU_STEP = 4096  # tokens that are read at once there, of whole prompts
CPU_CACHE = 2 * 2**30  # bytes; more answers than fit wait for their turn
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that an engine can be started for
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights need no pipe
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay where they are
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


_OPEN: weakref.WeakSet[VLLMEngine] = weakref.WeakSet()
_kept: deque[VLLMEngine] = deque(maxlen=2)  # run on when no rollout has them, for the next one


class Said(NamedTuple):
    """What the engine wrote behind a prompt."""

    ids: list[int]
    logprobs: list[float]
    """Of the distribution that it sampled from."""


def cpu_cache(answers: int, nbytes: int) -> int:
    """Bytes on a CPU for the keys and values of so many answers, each of so many bytes."""
    return max(min(answers * nbytes, CPU_CACHE), 2 * nbytes)


def running(
    model: PreTrainedModel,
    config: VLLMConfig,
    *,
    longest: int,
    start_for: int,
    batch_size: int,
    share_prompts: bool,
) -> VLLMEngine:
    """The engine of this process that can take the model's weights, or a new one.

    So the models of a stage that are alike, and all calls of each, share one engine.
    longest: tokens of a prompt with its answer; start_for: those that a new engine is started for.
    """
    kind = _kind(model, config, share_prompts)
    for engine in [*_OPEN]:
        if engine.kind == kind and engine.batch_size >= batch_size and engine.of_base(model):
            if engine.max_length >= longest:
                break
            engine.close()
    else:
        engine = VLLMEngine(model, config, max_length=start_for, batch_size=batch_size,
                            share_prompts=share_prompts)  # fmt: skip
    if engine in _kept:
        _kept.remove(engine)
    _kept.append(engine)
    return engine


def _kind(model: PreTrainedModel, config: VLLMConfig, share_prompts: bool) -> str:
    """What models have in common that can be in one engine after each other."""
    settings = model.config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        settings.pop(name, None)
    rank = adapter_settings(model)["lora_rank"] if has_adapter(model) else None
    return repr((type(model).__name__, sorted(settings.items(), key=repr), model.dtype,
                 str(model.device), rank, phantoms(model)[:1], config, share_prompts))  # fmt: skip


class VLLMEngine:
    """A vLLM engine, which `hand_over` gives the weights of a model.

    With LoRA it keeps the base as it is, and gets each new adapter; else it gets all weights.
    max_length: of a prompt and its answer together, in tokens.
    Errors: DataError where vLLM refuses the model, with its reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: VLLMConfig,
        *,
        max_length: int,
        batch_size: int,
        share_prompts: bool = True,
    ):
        self.kind, self.device = _kind(model, config, share_prompts), model.device.type
        self.max_length, self.batch_size = max_length, batch_size
        self.base = weakref.ref(model.get_input_embeddings().weight) if has_adapter(model) else None
        self.given: weakref.ref[PreTrainedModel] | None = None  # whose weights it has
        self.adapter: Any = None
        self.number = 0  # of the newest adapter: the engine knows one by it
        self.asleep = False
        self.on_gpu = self.device == "cuda"
        nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        with _undisturbed():
            self._check_can_hold(model)
            with _scratch(nbytes) as folder:
                plain = unadapted(model) if has_adapter(model) else model
                with without_generation_settings(plain):
                    plain.save_pretrained(folder)
                del plain
                self.llm = self._start(model, folder, config, share_prompts)
        if self.base is None:
            self.given = weakref.ref(model)
        # It would take the process group along that other engines of the process have too.
        self.llm.llm_engine.engine_core._finalizer.detach()
        _OPEN.add(self)

    def of_base(self, model: PreTrainedModel) -> bool:
        """Whether it has the base of an adapted model, or takes all weights."""
        return self.base is None or self.base() is model.get_input_embeddings().weight

    def _check_can_hold(self, model: PreTrainedModel) -> None:
        """vLLM computes where the model is, and knows its kind; before a file is written for it.

        For a kind that it has no code of its own for, vLLM takes transformers' class, and changes
        it so that the trainer's models of that class work no more.
        """
        from vllm import ModelRegistry
        from vllm.platforms import current_platform

        kind, name = current_platform.device_type, type(model).__name__
        if kind != self.device:
            raise DataError(f"--rollout vllm: the vLLM that is installed computes on {kind}, the "
                            f"model is on {self.device}, expected both on the same "
                            "(docs/vllm.md)")  # fmt: skip
        if name not in ModelRegistry.get_supported_archs():
            raise DataError(f"--rollout vllm: vLLM has no {name} of its own, expected a model that "
                            "it has; --rollout hf takes any")  # fmt: skip

    def _start(
        self, model: PreTrainedModel, folder: Path, config: VLLMConfig, share: bool
    ) -> Any:
        from vllm import LLM

        options: dict[str, Any] = {"gpu_memory_utilization": config.memory_share,
                                   "enable_sleep_mode": True}  # fmt: skip
        if not self.on_gpu:
            row = kept_nbytes(model.config, model.dtype) * self.max_length
            # A prompt is read whole: the generator of one that is read in parts would be set back,
            # which torch's cannot be on a CPU.
            options = {"kv_cache_memory_bytes": cpu_cache(self.batch_size, row),
                       "block_size": CPU_BLOCK, "enforce_eager": True,
                       "enable_chunked_prefill": False,
                       "max_num_batched_tokens": max(CPU_STEP, self.max_length, self.batch_size),
                       }  # fmt: skip
        if has_adapter(model):
            rank = adapter_settings(model)["lora_rank"]
            options |= {"enable_lora": True, "max_loras": 1,
                        "max_lora_rank": next((r for r in RANKS if r >= rank), rank)}  # fmt: skip
        if unsampled := phantoms(model):
            options["logits_processors"] = [_without(unsampled[0])]
        try:
            return LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the model's own settings of sampling
                dtype=dtype_name(model.dtype),
                max_model_len=self.max_length,
                max_num_seqs=self.batch_size,
                enable_prefix_caching=share,
                logprobs_mode="processed_logprobs",
                disable_log_stats=False,
                use_tqdm_on_load=False,
                **options,
            )
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
            raise DataError(f"--rollout vllm: vLLM does not take {type(model).__name__} with "
                            f"these settings: {_reason(error)}; --rollout hf does") from error

    @torch.no_grad()
    def hand_over(self, model: PreTrainedModel) -> None:
        """The model's weights as they are now; answers that the engine remembers are forgotten."""
        self.given = None
        with self._whole():
            if has_adapter(model):
                self._hand_over_adapter(model)
            else:
                weights = iter([*checkpoint(model).items()])
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                self.llm.apply_model(pack_tied_heads)
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept the keys and values of older weights")
        self.given = weakref.ref(model)

    def has(self, model: PreTrainedModel) -> bool:
        """Whether the weights that it was given last were those of the model, as they were."""
        return self.given is not None and self.given() is model

    def _hand_over_adapter(self, model: PreTrainedModel) -> None:
        from vllm.lora.request import LoRARequest

        old, self.number = self.number, self.number + 1
        nbytes = sum(x.numel() * x.element_size() for x in trainable(model))
        with _scratch(nbytes) as folder:
            save_adapter(model, folder)
            self.adapter = LoRARequest(f"step-{self.number}", self.number, str(folder))
            if old:
                self.llm.llm_engine.remove_lora(old)
            self.llm.llm_engine.add_lora(self.adapter)  # read into memory here

    def ask(self, prompts: Sequence[Sequence[int]], wanted: Sequence[dict[str, Any]]) -> list[Said]:
        """What the engine writes behind each prompt.

        wanted: the arguments of vLLM's `SamplingParams`, one a prompt.
        """
        from vllm import SamplingParams, TokensPrompt

        params = [SamplingParams(logprobs=0, detokenize=False, **one) for one in wanted]
        given = [TokensPrompt(prompt_token_ids=[*ids]) for ids in prompts]
        # It draws, and then takes the draws of the requests' seeds.
        with self._whole(), torch.random.fork_rng():
            found = self.llm.generate(given, params, use_tqdm=False, lora_request=self.adapter)
        return [_said(request.outputs[0]) for request in found]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Close the engine where the block does not come to its end, as after Ctrl-C: it would go
        on with the requests that are left, and reply to them among the next ones.
        """
        ended = False
        try:
            yield
            ended = True
        finally:
            if not ended:
                self.close()

    def prefix_hits(self) -> tuple[int, int]:
        """Tokens of prompts that were asked for since the start, and those among them that were
        computed before.
        """
        counts = {metric.name: metric for metric in self.llm.get_metrics()}
        return counts["vllm:prefix_cache_queries"].value, counts["vllm:prefix_cache_hits"].value

    def sleep(self) -> None:
        """Give the memory of a GPU free until `wake`; weights wait in the host's memory."""
        if self.on_gpu and not self.asleep and self in _OPEN:
            self.llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        """Have the memory again."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Give everything free; the process group too where no other engine of the process has it.
        """
        if self not in _OPEN:
            return
        _OPEN.discard(self)
        if self in _kept:
            _kept.remove(self)
        core = self.llm.llm_engine.engine_core.engine_core
        if _OPEN:
            core.model_executor.shutdown()
        else:
            core.shutdown()  # its client does so no more: see `__init__`
        del self.llm, core
        gc.collect()

    def __del__(self) -> None:
        self.close()


@atexit.register
def _close_all() -> None:
    for engine in [*_OPEN]:
        engine.close()


def _reason(error: Exception) -> str:
    """What vLLM says, in one line; pydantic puts a title before it and an address behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Value error,", "Assertion failed,"))]
    return (told or lines or [type(error).__name__])[0].removeprefix("Value error, ")


def _said(output: Any) -> Said:
    ids = [*output.token_ids]
    return Said(ids, [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)])


def checkpoint(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights of a model by the names of its files, tied ones once, as `save_pretrained`."""
    seen: set[tuple[Any, ...]] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        if (where := tied_key(tensor)) not in seen:
            seen.add(where)
            state[name] = tensor.detach()
    return revert_weight_conversion(model, state)


def pack_tied_heads(model: Any) -> None:
    """In the engine's model, compute once more what a head keeps of the embeddings it is tied to.

    On a CPU it keeps a packed copy, which vLLM renews where a weight of the head itself is given:
    of tied ones there is none, and the head would go on with the old embeddings.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _without(size: int) -> type:
    """A vLLM logits processor: no token behind the tokenizer's has a probability."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class KnownTokens(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            pass

        def apply(self, logits: Tensor) -> Tensor:
            logits[:, size:] = -torch.inf
            return logits

    return KnownTokens


@contextmanager
def _scratch(nbytes: int) -> Iterator[Path]:
    """A folder in memory where there is room for it, else on the disk; removed after the block."""
    memory, place = Path("/dev/shm"), None
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.2 * nbytes + 2**20:
        place = memory
    folder = tempfile.mkdtemp(prefix="tppo-", dir=place)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What vLLM sets for a whole process is, after the block, as it was: variables of the
    environment, generators of random numbers, torch's threads, what is garbage.
    """
    variables = dict(os.environ)
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), np.random.get_state()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        gc.unfreeze()  # what a process has when an engine starts would never be collected
        os.environ.clear()
        os.environ.update(variables)
