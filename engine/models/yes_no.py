"""A ranker that asks a language model: the score is its logit of yes less its logit of no, behind the words of a pair.

The head is the model's own, trained with all else or by its adapters: nothing is made anew. Of its vocabulary two rows
are computed, in float32 as all heads are here. The folder is a causal language model of transformers and nothing more.

Shapes: N pairs, H hidden size, L tokens of a padded batch, T of a packed one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from engine.errors import ModelError
from engine.models.head import has_trained_classifier
from engine.models.loading import load_backbone, load_tokenizer
from engine.models.pooled_score import BackboneScore

YES_NO: Literal["yes_no"] = "yes_no"
"""The form of this head, as `ranker.head` calls it."""
_PROBE = (1, 2, 3)
_TOLERANCE = 1e-3


class Answers(NamedTuple):
    """The two answers, each a word of one token."""

    words: tuple[str, str]
    ids: tuple[int, int]


class AnswerLinear(nn.Linear):
    """The last layer of a language model, of which the answers' logits alone are computed, in float32 at least."""

    answers: Tensor

    def forward(self, states_NH: Tensor) -> Tensor:
        """Map [N, H] to the logits of yes and of no [N, 2], float32 or float64."""
        dtype = torch.promote_types(torch.float32, self.weight.dtype)
        bias_2 = None if self.bias is None else self.bias.index_select(0, self.answers).to(dtype)
        rows_2H = self.weight.index_select(0, self.answers).to(dtype)
        return nn.functional.linear(states_NH.to(dtype), rows_2H, bias_2)


class YesNoScore(BackboneScore):
    """A language model that answers yes or no.

    Args:
        causal_lm: A causal language model of transformers, whose last layer is changed in place.
        answers: Its answers.
    """

    form: ClassVar[Literal["yes_no"]] = YES_NO
    """The head's, as `ranker.head` calls it."""

    def __init__(self, causal_lm: Any, answers: Answers) -> None:
        super().__init__(causal_lm)
        self.answers = answers
        layer = causal_lm.get_output_embeddings()
        # The very module, so that names, hooks and the weights that it may share with the embeddings stay.
        layer.__class__ = AnswerLinear
        ids_2 = torch.tensor(answers.ids, device=layer.weight.device)
        layer.register_buffer("answers", ids_2, persistent=False)

    @property
    def base_model(self) -> Any:
        """The language model without its last layer, as transformers' classifiers name theirs."""
        return self.backbone.base_model

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Score pairs, padded or packed; takes what the language model's forward takes.

        Returns:
            `logits` [N, 1] in float32 or a wider type, in the order of the pairs.

        Source: Zhang et al. 2025, "Qwen3 Embedding" (arXiv 2506.05176), whose score is the sigmoid of this one.
        """
        logits_N2 = self.backbone.get_output_embeddings()(self.pooled(inputs, "last"))
        return SimpleNamespace(logits=logits_N2[:, :1] - logits_N2[:, 1:])


def load_yes_no(name: str, words: tuple[str, str], section: str, common: Mapping[str, Any]) -> YesNoScore:
    """Load a causal language model with its trained last layer, and ask it for two words.

    Args:
        name: Hub id, local folder or `package:NAME`.
        words: For yes and for no.
        section: The recipe's section, for remedies.
        common: What `load_backbone` is told besides.

    Raises:
        ModelError: It cannot be loaded, is a trained classifier, lacks its last layer, or does more to its logits than
            that layer; or a word is not one token.
    """
    answers = find_answers(load_tokenizer(name, section=section), words, section)

    def refuse_classifier(model: Any, unused: Collection[str]) -> None:
        if has_trained_classifier(model.base_model, unused):
            raise ModelError(
                f"{name} is a sequence classifier, which has learnt a head of its own and answers nothing",
                expected="a causal language model",
                remedy=f"set {section}.head=pooler to go on from the trained head, or name a language model",
            )

    causal_lm = load_backbone(AutoModelForCausalLM, name, judge_unused=refuse_classifier, needs_head=True, **common)
    return asked(causal_lm, answers, name)


def asked(causal_lm: Any, answers: Answers, name: str) -> YesNoScore:
    """Make a language model a ranker, after a proof that its logits are what its last layer gives.

    Args:
        causal_lm: Of transformers, in evaluation mode; changed in place.
        answers: The two answers.
        name: The model, as the recipe names it.

    Raises:
        ModelError: It scales, caps or divides its logits.
    """
    if not isinstance(causal_lm.get_output_embeddings(), nn.Linear):
        raise ModelError(
            f"{type(causal_lm).__name__} of {name} has no linear layer that gives its logits",
            expected="a causal language model with one",
            remedy="name another model, or take another head",
        )
    ids_1L = torch.tensor([_PROBE])
    with torch.no_grad():
        logits_V = causal_lm(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), use_cache=False).logits[0, -1]
        expected = float(logits_V[answers.ids[0]] - logits_V[answers.ids[1]])
        model = YesNoScore(causal_lm, answers)
        found = float(model(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L)).logits)
    if not abs(found - expected) <= _TOLERANCE * max(1.0, abs(expected)):
        raise ModelError(
            f"{type(causal_lm).__name__} of {name} does more to its logits than its last layer gives: yes less no is "
            f"{expected:.4g}, by that layer {found:.4g}",
            expected="a language model that neither scales nor caps its logits",
            remedy="name another model, or take the head last",
        )
    return model


def find_answers(tokenizer: Any, words: Sequence[str], section: str) -> Answers:
    """Look up the tokens of the two answers.

    Args:
        tokenizer: A Hugging Face tokenizer.
        words: For yes and for no.
        section: The recipe's section, for remedies.

    Raises:
        ModelError: A word is not one token.
    """
    found = []
    for word, field in zip(words, ("yes_word", "no_word"), strict=True):
        ids = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ModelError(
                f"{section}.{field} {word!r} is {len(ids)} tokens of {type(tokenizer).__name__}: "
                f"{tokenizer.convert_ids_to_tokens(ids)}",
                expected="one token of its vocabulary, whose logit is the answer",
                remedy=f"set {section}.{field} to a word that is one",
            )
        found.append(int(ids[0]))
    return Answers((words[0], words[1]), (found[0], found[1]))
