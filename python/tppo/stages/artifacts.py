"""What the stages of this package leave for each other: files and folders, by their places."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage leaves for others, by its place in the run folder."""

    path: str
    """`stage/name`."""
    what: str
    """What it holds, for people."""
    optional: bool = False
    """Whether the stage may do without it."""
    every: bool = False
    """As an input: of every round up to the reader's own, not of the newest one alone."""

    def of_every_round(self) -> Artifact:
        """The input of a stage that reads what each round has left: `Run.paths` gives them."""
        return replace(self, every=True)

    def if_there(self) -> Artifact:
        """The input of a stage that also does without it."""
        return replace(self, optional=True)

    @property
    def stage(self) -> str:
        """The stage that makes it."""
        return self.path.split("/")[0]

    @property
    def name(self) -> str:
        """Its place in the stage's folder."""
        return self.path.partition("/")[2]


TRAIN_SESSIONS = Artifact("data/train.jsonl", "sessions that are trained on")
HELDOUT_SESSIONS = Artifact("data/heldout.jsonl", "sessions of other users, for stops and choices")
TEST_SESSIONS = Artifact("data/test.jsonl", "sessions of other users, for the closing table")
TRANSFER_SESSIONS = Artifact(
    "data/transfer.jsonl", "generated sessions with intents that were never trained on",
    optional=True,
)  # fmt: skip
SFT_MODEL = Artifact("sft/model", "the SFT model and its tokenizer, as save_pretrained writes them")
ANSWERS = Artifact("generate/answers.jsonl", "answers of the SFT model, a row each")
LABELS = Artifact("label/labels.jsonl", "labels of the words of those answers, and of the answers")
CATEGORIES = Artifact("map/categories.jsonl", "the class of every token of the labelled answers")
QUERY_LENGTHS = Artifact("map/lengths.json", "the median length of a query in tokens")
REWARD_MODEL = Artifact("train-rm/model", "the token reward model and its tokenizer; with LoRA "
                        "adapter and head over the SFT model")  # fmt: skip
REWARD_REPORT = Artifact("train-rm/report.json", "AUC and accuracy of the reward model, and who "
                         "labelled its data")  # fmt: skip
POLICY = Artifact("train/model", "the policy after PPO and its tokenizer; with LoRA an adapter "
                  "over the SFT model")  # fmt: skip
CRITIC = Artifact("train/critic.safetensors", "weights of the critic, where there is one",
                  optional=True)  # fmt: skip
TRAINING = Artifact("train/report.json", "steps, rewards and the weights kept of PPO")
BASELINES = {
    "sentence_labels": (
        Artifact("baselines/sentence_labels/model",
                 "the policy paid at the end by a model of whole answers", optional=True),
        Artifact("baselines/sentence_labels/report.json", "as that of `train`", optional=True),
    ),
    "paid_at_end": (
        Artifact("baselines/paid_at_end/model",
                 "the policy paid the total of its token rewards at the end", optional=True),
        Artifact("baselines/paid_at_end/report.json", "as that of `train`", optional=True),
    ),
}  # fmt: skip
OF_BASELINES = tuple(artifact for found in BASELINES.values() for artifact in found)
TEST_ANSWERS = Artifact("eval/answers.jsonl", "what each model of the table answered, a row a "
                        "test session")  # fmt: skip
RESULT = Artifact("eval/result.json", "the closing table; also in the run folder itself")
HEAT_ROWS = Artifact("heat/tokens.jsonl", "answers of SFT and TPPO token by token, a row each")
NOISE = Artifact("noise/noise.json", "how noisy the policy's gradient is, by where rewards are "
                 "paid")  # fmt: skip
MERGED_POLICY = Artifact("merge/policy", "the policy after PPO as a plain model", optional=True)
MERGED_REWARD_MODEL = Artifact("merge/reward-model", "the token reward model as a plain model",
                               optional=True)  # fmt: skip
PREFERENCES = Artifact("prefer/pairs.jsonl", "pairs of answers with the one that people find "
                       "better, as `tppo ser --pairs` reads them", optional=True)  # fmt: skip
EQUALS = Artifact("prefer/equal.jsonl", "pairs that people find equally good, or disagree on",
                  optional=True)  # fmt: skip
SER_MODEL = Artifact("ser/model", "the reward model that has labelled for itself, of whole answers "
                     "or of tokens, and its tokenizer")  # fmt: skip
SER_REPORT = Artifact("ser/report.json", "what each round kept, how right it was, and the accuracy "
                      "on held-out answers")  # fmt: skip
SER_POLICY = Artifact("ser-train/model", "the policy after PPO with that reward model")
PIT_POLICY = Artifact("pit/model", "the policy that betters answers, as a plain model")
PIT_GAP = Artifact("pit/gap", "the gap model of PIT: by how much an answer betters another")
PIT_REPORT = Artifact("pit/report.json", "figures of SFT, of the gap model and of both stages")
IMPROVED = Artifact("improve/steps.json", "figures of test users' answers, bettered k times")

SPLITS = {
    "train": TRAIN_SESSIONS, "heldout": HELDOUT_SESSIONS, "test": TEST_SESSIONS,
    "transfer": TRANSFER_SESSIONS,
}  # fmt: skip
