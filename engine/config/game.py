"""AR2's game: what its iterations train by, on what, and how often what they draw from is made anew.

Source: Zhang et al. 2022, "Adversarial Retriever-Ranker for Dense Text Retrieval", Algorithm 1 lines 6-16, Table 9.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.config.negatives import NegativesConfig
from engine.config.sections import Section
from engine.config.timetable import AUTO, Pool
from engine.config.training import OptimConfig, PhaseConfig


class Ar2Config(Section):
    """The adversarial game (AR2 Algorithm 1 lines 6-16, Table 9), and what the paper compares it with."""

    objective: Literal["ar2", "irgan", "ance"] = "ar2"
    """What both models are trained by. `ar2`: Eq. 7, 9 and 12. `irgan`: the pointwise game of Eq. 3, D0 included, where
    weights and forms of Eq. 9 and 12 say nothing (Table 5). `ance`: no ranker; the retriever contrasts positives with
    what it found itself at the last refresh, and all that is said of a ranker says nothing (Figure 4)."""
    irgan_support: Literal["group", "negatives"] = "group"
    """Documents of a query that IRGAN's generator draws from: positive and negatives, as in IRGAN, or the negatives
    alone, as d- in AR2's Eq. 3 may be read (the positive then gets no gradient)."""
    in_batch_negatives: Pool = "none"
    """Whose documents are negatives of the contrast beside a query's own n: nobody's, as in ANCE's released code, or
    those of its `rank` or of all ranks (`world`), as in G0's warm-up. Of ANCE, and of `contrastive_weight`."""
    order: Literal["paper", "released"] = "paper"
    """`paper`: retriever, refresh, ranker. `released`: ranker and retriever on the same candidates, then refresh."""
    iterations: int = Field(10, ge=0, le=10000)
    """Iterations of the game (AR2: 10)."""
    num_negatives: int = Field(15, ge=1)
    """Negatives of a query, drawn afresh at every step (n)."""
    top_k: int = Field(100, ge=1)
    """Depth of the candidates from which they are drawn, positives taken out."""
    overlap: Literal["none", "ranker", "split"] = "none"
    """What waits for the refresh of the index. `none`: everything else, as in the paper. `ranker`: once the corpus is
    encoded, the index is made and searched in processes beside the ranker's phase, which then draws from the candidates
    before these; the retriever's are fresh as ever. `split`: the corpus is encoded beside it, too, on devices that no
    rank trains on; what is drawn is the same as with `ranker` (docs/ar2.md)."""
    refresh_devices: int = Field(0, ge=0)
    """GPUs of each host that `overlap: split` keeps for the refresh; the ranks, fewer by as many, have the others. On
    CPUs, processes. It may change between two starts, as the number of ranks may."""
    refresh_every: int = Field(1, ge=1)
    """Iterations between two refreshes of the index. The iterations in between draw from what the last one found, and
    are not measured on dev, which would take an index. The last iteration always has one."""
    refresh_until: float | None = Field(None, gt=0, le=1)
    """Share of a query's `top_k` that stood in the candidates before, on average, from which on the index is left as
    it is until the last iteration, whose models are measured. Left out, it is always made anew."""
    rescore: Literal["asked", "always", "never"] = "asked"
    """When candidates that an older state of the retriever found (`overlap`, `refresh_every`, `refresh_until`) get the
    scores of its newest state, and their order by these, before a phase draws from them. `asked`: where `negatives` ask
    for the retriever's scores or ranks. `always`: also where they do not, which changes which are drawn, but not how
    likely each is. `never`: they keep the scores that they were found with (docs/ar2.md)."""
    mine: Literal["all", "sampled"] = "all"
    """Training queries searched at a refresh: all, or those that the next phases draw (trains the same)."""
    further_retrievers: tuple[str, ...] = ()
    """Whose candidates are drawn from together with the retriever's own, `top_k` of each: words as of
    `warmup_retriever.candidates`. Left out, none, as in the paper."""
    negatives: NegativesConfig = NegativesConfig()
    """Filters and sampler of the game's negatives (docs/negatives.md). The default is the paper's: uniform, unfiltered.
    G0's warm-up draws from its candidates as they are."""
    remove_answers: bool = True
    """Also take out documents that contain an answer, where the query has answers."""
    search_deeper: int = Field(1, ge=1)
    """Where less than `top_k` is left of a query's hits, it is searched deeper until `top_k` are found, to this many
    times `top_k` at most. 1: no deeper than n negatives need (docs/negatives.md). BM25's candidates likewise."""
    adversarial: Literal["paper", "with_positive", "released"] = "paper"
    """Form of Eq. 9: as printed (softmax over the negatives), with the positive in it, or as AR2's code has it."""
    adversarial_reduction: Literal["mean", "sum"] = "mean"
    """Mean over the queries, or the sum of the released code (which grows with the batch)."""
    adversarial_weight: float = Field(0.3, ge=0)
    """Weight of Eq. 9. The paper gives none: 1.0 is our reading of it, which its presets have. 0.3 does less harm with
    a weak ranker (docs/ar2.md). Released README: 0.5."""
    adversarial_from: Literal["start", "lead"] = "start"
    """From when on Eq. 9 counts: from the first iteration, or from the one on before which the ranker was above the
    retriever on dev, by the metric by which iterations are compared (`run.keep_best`; ours)."""
    distillation_weight: float = Field(1.0, ge=0)
    """Weight of Eq. 12. The paper gives none; 1.0 is our reading. Released README: 0.5."""
    contrastive_weight: float = Field(0.0, ge=0)
    """Weight of Eq. 2 beside Eq. 9 and 12, over the documents of the batch (`in_batch_negatives`), as in G0's warm-up:
    the ranker says how a query's candidates stand to each other, and the contrast keeps them above all others (ours;
    SimLM has 0.2 beside its distillation). 0, as in the paper."""
    teacher: Literal["lead", "dev", "always"] = "lead"
    """What the ranker's word counts (w) in Eq. 9 and 12; the rest of a query's group learns from its label, so that a
    weak ranker's groups become ordinary training on hard negatives. `lead`: by how far it is surer of the positive than
    the retriever, group by group, a half where both are equally sure (ours). `dev`: one number an iteration, by how far
    it was above the retriever on dev after the one before (ours). `always`: 1, as in the paper."""
    reference_batch_size: int = Field(8, ge=1)
    """Queries to which `sum` is scaled, so that the form does not depend on the number of ranks (README: 8 a GPU)."""
    retriever: PhaseConfig = PhaseConfig(steps=1500, optim=OptimConfig(lr=1e-5))
    """The retriever's phase (lines 7-10)."""
    ranker: PhaseConfig = PhaseConfig(steps=500, optim=OptimConfig(lr=1e-6))
    """The ranker's phase (lines 12-15)."""
    ranker_restarts: Literal["never", "warmup", "pretrained"] = "never"
    """From which weights the ranker's phase begins in each iteration: those it ended with (Algorithm 1), D0's, or the
    pre-trained ones (section 4.2 has D "initialized with ERNIE-2.0-large"). One that begins again has a new optimizer,
    and its schedule is that of one iteration."""

    @property
    def has_ranker(self) -> bool:
        """Whether a ranker is trained and plays."""
        return self.objective != "ance"

    @property
    def rescores(self) -> bool:
        """Whether candidates of an older state of the retriever are scored anew before they are drawn from."""
        asks = self.rescore == "always" or (self.rescore == "asked" and self.negatives.asks_retriever)
        return asks and self.retriever.steps > 0

    @property
    def minimised(self) -> Literal["", "irgan"]:
        """What the phases of both models minimise, as rows of the timetable say it; the warm-up of G0 aside."""
        return "irgan" if self.objective == "irgan" else ""

    @model_validator(mode="after")
    def _overlaps(self) -> Ar2Config:
        if self.overlap != "split" and self.refresh_devices:
            raise ValueError(
                f"refresh_devices is {self.refresh_devices} and overlap {self.overlap}, which keeps no devices for the "
                "refresh: set overlap to split, or leave refresh_devices out"
            )
        if self.overlap == "split" and not self.refresh_devices:
            raise ValueError(
                "overlap is split and refresh_devices 0, so that nobody would refresh: set refresh_devices to how many "
                "GPUs of each host (on CPUs, processes) are kept for it, or overlap to ranker"
            )
        if self.overlap == "none":
            return self
        without = "leave overlap and refresh_devices out" if self.overlap == "split" else "leave overlap out"
        if not self.has_ranker or not self.ranker.steps:
            why = f"the objective {self.objective} trains no ranker" if not self.has_ranker else "ranker.steps is 0"
            raise ValueError(
                f"overlap is {self.overlap}, but {why}, so that nothing trains beside the refresh: {without}"
            )
        if self.overlap == "ranker" and self.ranker.micro_batch_tokens == AUTO:
            raise ValueError(
                f"overlap is {self.overlap} and ranker.micro_batch_tokens auto, whose trials would find the memory "
                "that the refresh beside it is about to take: name a number, such as one that an earlier run recorded"
            )
        if self.order != "paper":
            raise ValueError(
                f"overlap is {self.overlap}, but in the order {self.order} the refresh ends an iteration, and the "
                f"ranker's phase of the next is what it would run beside: set order to paper, or {without}"
            )
        return self

    @model_validator(mode="after")
    def _objective_is_whole(self) -> Ar2Config:
        if self.objective != "irgan" and self.irgan_support != "group":
            raise ValueError(
                f"irgan_support is {self.irgan_support}, but the objective {self.objective} has no generator of "
                "IRGAN's: set objective to irgan, or leave it out"
            )
        if self.adversarial_reduction == "mean" and not self.is_default("reference_batch_size"):
            raise ValueError(
                f"reference_batch_size is {self.reference_batch_size}, but adversarial_reduction mean adds nothing up "
                "that it would scale: set adversarial_reduction to sum, or leave it out"
            )
        if self.objective != "ar2" and self.contrastive_weight:
            raise ValueError(
                f"contrastive_weight is {self.contrastive_weight}, but the objective {self.objective} has no Eq. 9 and "
                "12 that the contrast could stand beside: set objective to ar2, or leave it out"
            )
        if self.contrastive_weight and self.in_batch_negatives == "none":
            raise ValueError(
                f"contrastive_weight is {self.contrastive_weight} and in_batch_negatives none, and over a query's own "
                "negatives the contrast is what `teacher` weighs: set in_batch_negatives to world, or leave the weight "
                "out"
            )
        if self.objective != "ance" and not self.contrastive_weight and self.in_batch_negatives != "none":
            either = ", give contrastive_weight a value (SimLM: 0.2)" if self.objective == "ar2" else ""
            raise ValueError(
                f"in_batch_negatives is {self.in_batch_negatives}, but the objective {self.objective} takes a "
                f"query's own negatives alone: set objective to ance{either}, or leave it out"
            )
        plays = self.iterations and self.retriever.steps
        if plays and self.has_ranker and self.ranker_restarts == "pretrained" and not self.ranker.steps:
            raise ValueError(
                "ranker_restarts is pretrained and ranker.steps 0, so that an untrained ranker would be the opponent: "
                "raise ranker.steps, or set ranker_restarts to never"
            )
        if plays and self.objective == "irgan" and self.irgan_support == "negatives" and self.num_negatives == 1:
            raise ValueError(
                "with num_negatives 1 and irgan_support negatives the generator has one document to draw from, and the "
                "retriever would learn nothing: raise num_negatives, or set irgan_support to group"
            )
        return self

    @property
    def unread(self) -> dict[str, tuple[str, ...]]:
        """Options that have other values than their defaults and that nothing reads, by why."""
        names = ["adversarial", "adversarial_reduction", "adversarial_from"]
        if self.objective != "ar2":
            why = f"objective is {self.objective}"
            names += ["adversarial_weight", "distillation_weight", "teacher"]
            names += [] if self.has_ranker else ["ranker_restarts"]
        elif not self.adversarial_weight:
            why = "adversarial_weight is 0"
        else:
            return {}
        vain = tuple(f"ar2.{name}" for name in names if not self.is_default(name))
        return {f"ar2.{why}": vain} if vain else {}

    @property
    def decided_on_dev(self) -> list[str]:
        """The options that ask how good both models were on dev."""
        waits = self.adversarial_from == "lead" and self.adversarial_weight > 0
        asked = {"ar2.adversarial_from=lead": waits, "ar2.teacher=dev": self.teacher == "dev"}
        return [option for option, is_set in asked.items() if is_set and self.objective == "ar2"]

    @model_validator(mode="after")
    def _teaches(self) -> Ar2Config:
        if self.objective != "ar2" or not self.iterations or not self.retriever.steps:
            return self
        if not self.distillation_weight and not self.adversarial_weight:
            raise ValueError(
                "adversarial_weight and distillation_weight are 0, so the retriever would learn nothing from the "
                "ranker: raise one, or set retriever.steps to 0"
            )
        if not self.distillation_weight and self.num_negatives == 1 and self.adversarial == "paper":
            taught = "nothing" if self.teacher == "always" else "nothing but how much its labels count"
            raise ValueError(
                "with num_negatives 1 and distillation_weight 0 the gradient of Eq. 9 as printed is 0, its softmax "
                f"being over one document: the ranker would teach the retriever {taught}. Raise one of them, or set "
                "adversarial to with_positive or released"
            )
        if not self.distillation_weight and self.teacher == "always" and self.adversarial_from == "lead":
            raise ValueError(
                "with distillation_weight 0 and teacher always the retriever learns from Eq. 9 alone, which "
                "adversarial_from lead leaves out until the ranker leads: set one of them to something else"
            )
        return self
