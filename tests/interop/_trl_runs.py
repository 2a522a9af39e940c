"""Small GRPO runs: a Llama of 30,000 weights over an alphabet, and how a run of it is made."""

import contextlib
import io
import os
import warnings
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging
from trl import GRPOConfig, GRPOTrainer

SHORT = "TPPO_INTEROP_SHORT" in os.environ
LETTERS = "abcdefghijklmnopqrstuvwxyz "
VOWELS = set("aeiou")


def alphabet():
    """A tokenizer of single characters."""
    words = {"<pad>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(LETTERS)}}
    whole = Tokenizer(models.WordLevel(words, unk_token="a"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    whole.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="</s>")


def settled() -> None:
    """transformers tells of nothing but errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def saved_model(folder: Path, seed: int = 0) -> str:
    """Random weights that prefer some letters, in a folder: TRL reads its reference from a path."""
    settled()
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(LETTERS) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, initializer_range=0.3)).save_pretrained(folder)
    alphabet().save_pretrained(folder)
    return str(folder)


def count_vowels(completions, **_):
    """The total of `pay_vowels`."""
    return [float(sum(c in VOWELS for c in text)) for text in completions]


def share_of_vowels(completions, **_):
    """The share of vowels among ten letters."""
    return [total / 10 for total in count_vowels(completions)]


def pay_vowels(completion_ids, **_):
    """1 at each token that is a vowel."""
    paid = {LETTERS.index(c) + 2 for c in VOWELS}
    return [[float(t in paid) for t in ids] for ids in completion_ids]


def made(kind: type[GRPOTrainer], model: str, out: Path, *, reward=count_vowels, prompts=None,
         **settings):
    """A trainer; settings of TokenGRPOTrainer go to it, all others to GRPOConfig."""
    own = {name: settings.pop(name) for name in ("token_advantages", "gamma") if name in settings}
    settings = {"max_steps": 15, "per_device_train_batch_size": 8, "num_generations": 4,
                "max_completion_length": 10, "learning_rate": 3e-3, "seed": 1, **settings}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = kind(
            model, reward, processing_class=alphabet(), **own,
            args=GRPOConfig(output_dir=str(out), logging_steps=1, report_to="none", use_cpu=True,
                            bf16=False, save_strategy="no", disable_tqdm=True, **settings),
            train_dataset=prompts if isinstance(prompts, datasets.IterableDataset) else
            datasets.Dataset.from_dict({"prompt": prompts or ["ab", "cd", "ef", "gh"] * 20}))
    return trainer


def logged(kind: type[GRPOTrainer], model: str, out: Path, **settings) -> list[dict[str, float]]:
    """What a training logs at every step."""
    return logged_by(made(kind, model, out, **settings))


def logged_by(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """What a trainer logs at every step of its training."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer.state.log_history
