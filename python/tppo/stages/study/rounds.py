"""Labels in rounds: while PPO trains, answers of the policy of then are labelled, and it goes on
with a reward model of all that are.
"""

from __future__ import annotations

from dataclasses import replace

from tppo.labels.rule import label_by_rule
from tppo.methods.ppo import PPO
from tppo.models.tokenizer import decode
from tppo.stages.answers import Answer
from tppo.stages.study.config import Cell
from tppo.stages.study.material import Labelled, Material
from tppo.stages.study.reward_models import chosen_first, replace_word_model, word_model_of


class Rounds:
    """The labelled answers of a cell, which grow where its arm has those of the policy labelled."""

    def __init__(self, material: Material, cell: Cell):
        self.material, self.cell = material, cell
        self.pairs = chosen_first(material, cell) if cell.later_rounds else []
        self.sessions = {session.id: session for session in material.sessions}

    def before(self, step: int, trainer: PPO) -> None:
        """Label what is to be labelled before a step, and pay by all labels from then on."""
        wanted = self.cell.later_rounds.get(step)
        if wanted is None:
            return
        self.pairs += self._labelled(trainer, step, wanted)
        model = word_model_of(self.material, self.pairs, self.cell.noise)
        replace_word_model(trainer.reward, model)

    def _labelled(self, trainer: PPO, step: int, wanted: int) -> list[Labelled]:
        """Answers of the policy to the prompts that the next labelled answers would have had."""
        run, found = self.material.run, list[Labelled]()
        asked = [answer for answer, _ in self.material.pool[len(self.pairs) : wanted]]
        sampling = replace(run.sampling(), seed=self.material.seed * 10_000 + step)
        rollout = trainer.rollout.generate([answer.prompt_ids for answer in asked], sampling)
        for old, ids, finish in zip(asked, rollout.response_ids, rollout.finish, strict=True):
            text = decode(run.tokenizer, ids, run.eos_ids)
            own = Answer(f"{old.id}@{step}", old.session, old.prompt_ids, ids, finish, text)
            targets = self.sessions[old.session].targets
            label = label_by_rule(own.id, text, targets, run.config.label.sentence_threshold)
            found.append((own, label))
        return found
