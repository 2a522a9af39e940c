"""The stages up to the reward model; each reads files of the run folder and writes files."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.labels.agreement import compare_files
from tppo.labels.endpoint.batch import export_batch, import_batch
from tppo.labels.endpoint.config import NoKey
from tppo.labels.endpoint.live import EndpointError, LabelItem, label
from tppo.labels.endpoint.lost import forget, lost_by_endpoint, recorded
from tppo.labels.label import Label, iter_labels, write_labels
from tppo.labels.queries import SEPARATOR, answer_text
from tppo.labels.rule import label_by_rule
from tppo.labels.words import map_labels
from tppo.methods.reward_model import (
    PolicyTokens,
    Reader,
    evaluate_reward_model,
    relevant_share,
    train_reward_model,
)
from tppo.methods.sft import Examples, train_sft
from tppo.models.folder import model_eos_ids, save_model
from tppo.models.own_tokens import OwnTokens, start_reward_model
from tppo.models.policy import load_policy, new_policy, place
from tppo.models.rollout import HFRollout
from tppo.models.tokenizer import decode, load_tokenizer, token_offsets, train_tokenizer
from tppo.progress import say, track
from tppo.sessions.prompts import check_separator, encode_answer, prompt_text
from tppo.sessions.session import DataError, Session, session_of
from tppo.sessions.split import split_log, write_generated
from tppo.stages.reward_rows import own_rows, own_twins, policy_rows, policy_twins
from tppo.stages.run import Answer, Run, answer_cap, answer_of, fit_prompts
from tppo.store.jsonl import read_lines, write_json, write_jsonl
from tppo.store.line_index import LineIndex


def data(run: Run) -> None:
    """Sessions, generated or read, split by user into train, heldout, test (and transfer)."""
    with run.stage("data") as out:
        if run.data is None:
            counts = write_generated(run.config.sessions, run.seed, out)
        else:
            counts = split_log(run.data, run.config.sessions, run.seed, out)
        say("data: " + ", ".join(f"{count} sessions to {name}" for name, count in counts.items()))


def sft(run: Run) -> None:
    """Tokenizer and model, trained on the true next queries to the early stop."""
    with run.stage("sft") as out:
        train, heldout = run.sessions("train"), run.sessions("heldout")
        tokenizer, model = _base_model(run, train)
        cap = answer_cap(tokenizer, train, run.config.generate)
        result = train_sft(
            model,
            _examples(tokenizer, model, train, cap),
            _examples(tokenizer, model, heldout, cap),
            run.config.sft,
            pad_id=tokenizer.pad_token_id,
            seed=run.seed,
            prefix=run.config.prefix,
        )
        save_model(model, tokenizer, out / "model")
        write_jsonl(out / "metrics.jsonl", result.history)
        report = {name: value for name, value in result._asdict().items() if name != "history"}
        write_json(out / "report.json", report)
        say(
            f"sft: stopped at step {result.steps}, kept step {result.best_step} "
            f"with held-out loss {result.heldout_loss:.3f} nats a token"
        )


def _base_model(
    run: Run, train: Sequence[Session]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if run.model is not None:
        tokenizer, model = load_tokenizer(run.model), load_policy(run.model, run.device)
        check_separator(tokenizer, model_eos_ids(tokenizer, model))
        return tokenizer, model
    texts = (text for s in train for text in (prompt_text(s), answer_text(s.targets)))
    tokenizer = train_tokenizer(texts, run.config.scratch.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = new_policy(run.config.scratch, tokenizer)
    return tokenizer, place(model, run.device)


def _examples(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    sessions: Sequence[Session],
    cap: int,
) -> Examples:
    """Prompts with their true answers; an answer longer than the cap is cut, and has no EOS."""
    answers = [encode_answer(tokenizer, session.targets)[:cap] for session in sessions]
    return Examples(fit_prompts(tokenizer, sessions, model, cap), answers)


def generate(run: Run) -> None:
    """Answers of the SFT model to training sessions."""
    with run.stage("generate") as out:
        model, sessions = run.sft_model(), run.sessions("train")
        config = run.config.generate
        order = random.Random(f"{run.seed}/generate").sample(sessions, len(sessions))
        n = min(config.samples, config.samples_per_session * len(sessions))
        chosen = [order[i % len(order)] for i in range(n)]
        prompts = run.prompts(order[:n], model)
        engine = HFRollout(
            model,
            pad_id=run.tokenizer.pad_token_id,
            eos_id=run.eos_ids,
            batch_size=config.batch_size,
            prefix=run.config.prefix,
        )
        rollout = engine.generate(
            [prompts[i % len(prompts)] for i in range(n)], run.sampling(seed=run.seed)
        )
        write_jsonl(
            out / "answers.jsonl",
            (
                {
                    "id": f"{session.id}#{i // len(order)}",
                    "session": session.id,
                    "prompt_ids": rollout.prompt_ids[i],
                    "response_ids": rollout.response_ids[i],
                    "finish": rollout.finish[i],
                    "text": decode(run.tokenizer, rollout.response_ids[i], run.eos_ids),
                }
                for i, session in enumerate(chosen)
            ),
        )


def label_answers(run: Run) -> None:
    """Word and answer labels, by the rule or by an endpoint."""
    train, config = run.path("data/train.jsonl"), run.config.label
    with (
        run.stage("label") as out,
        LineIndex(train, session_of) as sessions,
        ExitStack() as open_until_then,
    ):
        counts: Counter[str] = Counter()
        labels: Iterable[Label]
        if config.labeller == "rule":
            forget(run.label_lost)
            labels = (
                label_by_rule(a.id, a.text, _asked(sessions, a).targets, config.sentence_threshold)
                for a in track(run.iter_answers(), "label")
            )
        else:
            answers = sum(1 for _ in read_lines(run.path("generate/answers.jsonl")))
            found = label(_items(run, sessions), config.endpoint, run.label_cache, answers)
            labels = open_until_then.enter_context(recorded(found, run.label_lost))
        write_labels(out / "labels.jsonl", _counted(labels, counts))
        if not counts["labels"]:
            raise DataError("none of the generated answers got a label")
        relevant = counts["relevant"] / counts["labels"]
        say(f"label: {counts['labels']} answers, {relevant:.1%} of them relevant")
    if lost := lost_by_endpoint(run.label_lost):
        say(
            f"label: the endpoint lost {lost} items ({run.label_lost}): the next `tppo run` asks "
            "them again; new labels change what map and train-rm read, so that these and the "
            "stages after them run again"
        )


def label_lost_again(run: Run) -> None:
    """Ask for the labels that a finished stage lost to the endpoint; without an endpoint that
    answers, the labels stay as they were."""
    say(f"label: the endpoint lost {lost_by_endpoint(run.label_lost)} items, asked again")
    try:
        label_answers(run)
    except (EndpointError, NoKey) as error:
        say(f"label: its labels stay as they were: {error}")


def export_labels(run: Run, path: Path) -> None:
    """The questions that an endpoint has not answered yet, as an OpenAI batch file."""
    with LineIndex(run.inputs("label")[0], session_of) as sessions:
        export_batch(_items(run, sessions), run.config.label.endpoint, run.label_cache, path)


def import_labels(run: Run, path: Path) -> None:
    """Answers of an OpenAI batch, checked, to where the label stage finds them."""
    with LineIndex(run.inputs("label")[0], session_of) as sessions:
        import_batch(_items(run, sessions), run.config.label.endpoint, run.label_cache, path)


def compare_labels(run: Run, path: Path) -> None:
    """Print how far the run's labels agree with those of a file."""
    own = run.path("label/labels.jsonl")
    if not own.exists():
        raise DataError(f"{own}: no such file; run `tppo label --out {run.out}` first")
    print(compare_files(own, path))


def _items(run: Run, sessions: LineIndex[Session]) -> Iterator[LabelItem]:
    """What an endpoint is to judge, one at a time; the history as the policy sees it."""
    for answer in run.iter_answers():
        session = _asked(sessions, answer)
        history = [f"profile: {line}" for line in session.profile]
        history += [f"{event.type}: {event.text}" for event in session.history]
        yield LabelItem(answer.id, history, list(session.targets), answer.text)


def _asked(sessions: LineIndex[Session], answer: Answer) -> Session:
    """The session that an answer belongs to."""
    session = sessions.get(answer.session)
    if session is None:
        raise DataError(f"answers of session {answer.session!r}, which data/train.jsonl lacks")
    return session


def _counted(labels: Iterable[Label], counts: Counter[str]) -> Iterator[Label]:
    for item in labels:
        counts["labels"] += 1
        counts["relevant"] += item.sentence
        yield item


def map_to_tokens(run: Run) -> None:
    """Word labels to token categories, and the median length of a query in tokens."""
    generated = run.path("generate/answers.jsonl")
    with run.stage("map") as out, LineIndex(generated, answer_of) as answers:
        lengths: Counter[int] = Counter()
        labels = _with_words(track(iter_labels(run.path("label/labels.jsonl")), "map"))
        write_jsonl(
            out / "categories.jsonl",
            (_map_one(run, item, answers.get(item.id), lengths) for item in labels),
        )
        queries = lengths.total()
        ordered = (n for n in sorted(lengths) for _ in range(lengths[n]))
        median = next(islice(ordered, queries // 2, None), 1)
        write_json(out / "lengths.json", {"median_query_tokens": median, "queries": queries})


def _with_words(labels: Iterable[Label]) -> Iterator[Label]:
    """The labels; raises DataError where none of them is of a word."""
    found = False
    for item in labels:
        found = found or bool(item.words)
        yield item
    if not found:
        raise DataError(
            "no word has a label, expected some: a token reward model needs labels of words "
            "(--label.endpoint.template words)"
        )


def _map_one(
    run: Run, item: Label, answer: Answer | None, lengths: Counter[int]
) -> dict[str, object]:
    """Token categories of one answer; counts the tokens of each of its queries."""
    if answer is None:
        raise DataError(f"label {item.id!r}: no generated answer has this id")
    text, offsets = token_offsets(run.tokenizer, answer.response_ids, run.eos_ids)
    if text != item.response:
        raise DataError(f"label {item.id!r}: its response {item.response!r} is not {text!r}")
    start = 0
    for line in text.split(SEPARATOR):
        end = start + len(line)
        if line.strip():
            lengths[sum(a < end and b > start for a, b in offsets)] += 1
        start = end + len(SEPARATOR)
    return {
        "id": item.id,
        "categories": map_labels(text, item.words, offsets),
        "sentence": item.sentence + 1,
    }


def train_rm(run: Run) -> None:
    """The token reward model, its trunk started from SFT or from a folder of its own."""
    with run.stage("train-rm") as out:
        config = run.config.reward_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model, tokenizer = start_reward_model(
                config.model, run.path("sft/model"), run.tokenizer, run.device
            )
        reader: Reader
        if model.config.own_tokens:
            reader = own = OwnTokens(model, tokenizer)
            rows, twins = own_rows(run, own), own_twins(run, own)
        else:
            reader = PolicyTokens(model, run.tokenizer.pad_token_id, run.config.prefix)
            rows, twins = policy_rows(run), policy_twins(run)
        sessions = random.Random(f"{run.seed}/reward").sample(sorted(rows), len(rows))
        if len(sessions) < 2:
            raise DataError("1 session is labelled, expected at least 2: one is held out")
        n_heldout = max(1, round(config.heldout_share * len(sessions)))
        heldout = [row for session in sessions[:n_heldout] for row in rows[session]]
        train = [row for session in sessions[n_heldout:] for row in rows[session]]
        repeated = [row for session in sessions[n_heldout:] for row in twins.get(session, ())]
        history = train_reward_model(reader, train + repeated, config, seed=run.seed)
        report = evaluate_reward_model(reader, heldout, config)
        unseen = [row for session in sessions[:n_heldout] for row in twins.get(session, ())]
        report["auc_repeated"] = evaluate_reward_model(reader, unseen, config)["auc"]
        report |= {"sessions": len(sessions), "answers": len(train) + len(heldout)}
        report["labeller"] = next(iter_labels(run.path("label/labels.jsonl"))).labeller
        report["relevant_share"] = relevant_share(train + heldout)
        report["own_tokens"] = model.config.own_tokens
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        write_jsonl(out / "metrics.jsonl", history)
        write_json(out / "report.json", report)
        auc, of_repeated = (
            "unknown" if report[name] is None else f"{report[name]:.3f}"
            for name in ("auc", "auc_repeated")
        )
        say(
            f"reward model: AUC {auc}, accuracy {report['accuracy']:.3f} on held-out answers; AUC "
            f"{of_repeated} where one of their queries is repeated"
        )
