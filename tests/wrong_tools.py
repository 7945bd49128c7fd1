"""Five other ways to find out where harm is decided, each a whole pipeline of its own, and each wrong somewhere.

Each looks at all pairs of a planted model and says something of one claim. On some cases it is right, so it is no straw
man; that it is wrong on others, and that `selfcheck` has these, shows that the check can fail.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from remote_mediation.engine.tasks import Reading, read_task, screen_tasks
from remote_mediation.lab import Floats, Lab
from remote_mediation.planted.cases import NO, OPEN, YES, Specimen
from remote_mediation.sites import Site, band, thirds

FEW = 0.01
"""Part of the late neurons that is called sparse."""


class Subject(NamedTuple):
    """A planted model, and a way to ask it."""

    lab: Lab
    specimen: Specimen

    @property
    def layers(self) -> int:
        return self.lab.study.info.layers

    @property
    def te(self) -> float:
        pairs = self.lab.pairs()
        return float(self.lab.joint([[Site("layer_output", self.layers - 1, "last")]], pairs).te.mean())

    def activity(self, component: str, layers: range) -> Floats:
        """A component at the last token of every prompt: [pair, side, layer, width]."""
        found = []
        for pair in self.lab.pairs():
            for ids in pair.prompts:
                readings = [Reading(component, layer, (len(ids) - 1,)) for layer in layers]  # type: ignore[arg-type]
                found.append(read_task(pair.id, ids, readings, self.lab.study.setting))
        values = np.array(self.lab.run(found), dtype=np.float64)
        return values.reshape(len(self.lab.pairs()), 2, len(layers), -1)


def correlation_with_harm(subject: Subject) -> tuple[int, str]:
    """Claim 3: the gate is what tells harmful prompts from harmless ones: neurons that correlate above 0.9."""
    activity = subject.activity("mlp_neurons", thirds(subject.layers).late)
    prompts = activity.reshape(-1, activity.shape[2] * activity.shape[3])
    label = np.tile([0.0, 1.0], len(activity))
    centred, harm = prompts - prompts.mean(0), label - label.mean()
    correlation = (harm @ centred) / np.sqrt((harm**2).sum() * (centred**2).sum(0).clip(1e-12))
    count = int((np.abs(correlation) > 0.9).sum())
    return 3, YES if 0 < count <= FEW * prompts.shape[1] else NO


def difference_times_unembedding(subject: Subject) -> tuple[int, str]:
    """Claim 3: what late neurons write at the last token, read off along the answers (direct logit attribution)."""
    late, model = thirds(subject.layers).late, subject.specimen.model
    activity = subject.activity("mlp_neurons", late)
    stream = subject.activity("layer_output", range(subject.layers - 1, subject.layers))
    scale = np.sqrt((stream**2).mean())
    plus, minus = subject.specimen.tokenizer.convert_tokens_to_ids([subject.specimen.plus, subject.specimen.minus])
    with torch.no_grad():
        answers = (model.lm_head.weight[plus] - model.lm_head.weight[minus]) * model.model.norm.weight
        heard = [(answers @ model.model.layers[layer].mlp.down_proj.weight).numpy() for layer in late]
    credit = ((activity[:, 1] - activity[:, 0]).mean(0) * np.stack(heard) / scale).ravel()
    few = np.sort(credit)[::-1][: int(FEW * credit.size)]
    return 3, YES if few.sum() > 0.5 * subject.te else NO


def blind_to_attention(subject: Subject) -> tuple[int, str]:
    """Claim 2: MLPs carry harm if all of them swapped together bring more than half of it; nobody asks attention."""
    found = subject.lab.joint([band("mlp_output", range(subject.layers), "all")], subject.lab.pairs())
    return 2, YES if found.nie.mean() > 0.5 * found.te.mean() else NO


def nie_only(subject: Subject) -> tuple[int, str]:
    """Claim 3: few late neurons are a gate if they are sufficient; whether harm can do without them is not asked."""
    study, pairs = subject.lab.study, subject.lab.pairs("heldout")
    screened = subject.lab.run(screen_tasks(subject.lab.pairs("discovery"), "mlp_neurons", "all", study.setting))
    estimate = np.sum(screened, axis=0).reshape(2, study.info.layers, study.info.d_ff)[0]
    late = thirds(subject.layers).late
    order = np.argsort(-estimate[late.start :], axis=None)[: int(FEW * len(late) * study.info.d_ff)]
    chosen = [(late.start + int(one) // study.info.d_ff, int(one) % study.info.d_ff) for one in order]
    units = {layer: tuple(sorted(unit for at, unit in chosen if at == layer)) for layer, _ in sorted(chosen)}
    found = subject.lab.joint([[Site("mlp_neurons", layer, "all", own) for layer, own in units.items()]], pairs)
    return 3, YES if found.nie.mean() > 0.5 * found.te.mean() else NO


def sums_of_sites(subject: Subject) -> tuple[int, str]:
    """Claim 1: the late third's part of the effects of all modules, each swapped alone, added up."""
    sites = [
        Site(component, layer, "all")
        for layer in range(subject.layers)
        for component in ("attention_output", "mlp_output")
    ]
    nie = subject.lab.indirect(sites, subject.lab.pairs()).nie.mean(axis=1).clip(min=0)
    part = nie[2 * thirds(subject.layers).late.start :].sum() / nie.sum()
    return 1, YES if part > 2 / 3 else NO if part < 1 / 3 else OPEN
