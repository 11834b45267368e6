"""What a request may say: its form, its limits, and what is answered where it breaks them.

Bodies are JSON as users of Elasticsearch (`/search`) and of text-embeddings-inference (`/embed`, `/rerank`) write
them. Whatever is wrong with one is the client's to mend, and comes back as an error of 4xx that says what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from engine.config.expected import expected_of
from launcher.commands.search_engine import Order

B = TypeVar("B", bound="Body")
_SHOWN_CHARACTERS = 80
_SHOWN_PROBLEMS = 5


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: What is wrong, with its values, and what is expected.
        kind: One word for programs.
        headers: To be sent with it.
    """

    def __init__(self, status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.headers = status, message, kind, headers or {}


@dataclass(frozen=True, slots=True)
class Limits:
    """How large requests may be."""

    max_k: int = 1000
    """Documents that a search returns at most."""
    max_texts: int = 32
    """Queries or texts of one request."""
    max_query_characters: int = 2000
    """Characters of a query."""
    max_text_characters: int = 20_000
    """Characters of a text to embed or to re-rank."""
    max_body_bytes: int = 2_000_000
    """Bytes of a body."""
    max_waiting: int = 512
    """Texts that wait for the models; further ones are told to come again."""
    body_seconds: float = 30.0
    """How long a body may take to arrive."""

    def require_texts(self, texts: Sequence[str], what: str, *, are_queries: bool) -> None:
        """Refuse no text, too many, and one that is empty or too long.

        Args:
            texts: Of a request.
            what: The field's name.
            are_queries: Which limit of characters they have.

        Raises:
            Refused: Which, and the limit.
        """
        if not texts:
            raise Refused(422, f"{what} is empty: expected one text or more", "validation")
        if len(texts) > self.max_texts:
            raise Refused(413, f"{what} has {len(texts)} texts: expected at most {self.max_texts}", "too_large")
        most = self.max_query_characters if are_queries else self.max_text_characters
        for place, text in enumerate(texts):
            name = what if len(texts) == 1 else f"{what}[{place}]"
            if not text.strip():
                raise Refused(422, f"{name} is empty: expected a text", "validation")
            if len(text) > most:
                of = f" of a query (a document: {self.max_text_characters})" if are_queries else ""
                raise Refused(413, f"{name} has {len(text)} characters: expected at most {most}{of}", "too_large")

    def require_k(self, k: int) -> None:
        """Refuse to return so many documents.

        Raises:
            Refused: It is above the limit.
        """
        if k > self.max_k:
            raise Refused(422, f"size is {k}: expected at most {self.max_k}", "validation")


class Body(BaseModel):
    """A body in JSON: no unknown field, and no number or text in place of the other."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class MatchedText(Body):
    """`{"query": "a question"}`, the long form within a `match`."""

    query: str


class MatchedField(Body):
    """The field that a `match` names; a document is always read as a whole."""

    text: str | MatchedText


class Match(Body):
    """`{"match": {"text": "a question"}}`, as Elasticsearch has it."""

    match: MatchedField

    @property
    def question(self) -> str:
        """What is asked."""
        return self.match.text if isinstance(self.match.text, str) else self.match.text.query


class SearchBody(Body):
    """A search."""

    query: str | Match | list[str]
    """A question, or several."""
    size: int = Field(10, ge=1, validation_alias=AliasChoices("size", "k"))
    """Documents for each."""
    order: Order | None = None
    """By whose scores; None for the best that the run has."""
    source: bool = Field(True, alias="_source")
    """Whether titles and texts are sent."""

    @property
    def questions(self) -> list[str]:
        """What is asked."""
        if isinstance(self.query, list):
            return self.query
        return [self.query if isinstance(self.query, str) else self.query.question]


class EmbedBody(Body):
    """Texts to encode."""

    inputs: str | list[str]
    """A text, or several."""
    prompt_name: Literal["query", "document"] = "query"
    """As what: the sides may have towers, prompts and lengths of their own."""
    normalize: bool = False
    """Whether vectors get length 1; left out, they are as the retriever was trained, and as its index holds them."""
    truncate: bool = True
    """Whether a text that is too long is cut, or refused."""

    @property
    def texts(self) -> list[str]:
        """The texts."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class TitledText(Body):
    """A document with a title."""

    title: str = ""
    text: str


class RerankBody(Body):
    """Texts to order by a ranker."""

    query: str
    """The question."""
    texts: list[str | TitledText]
    """The documents."""
    raw_scores: bool = False
    """Whether scores are logits; otherwise they are brought between 0 and 1 by a sigmoid."""
    return_text: bool = False
    """Whether the texts come back."""
    truncate: bool = True
    """Whether a text that is too long is cut, or refused."""

    @property
    def titled(self) -> list[TitledText]:
        """The documents."""
        return [TitledText(text=one) if isinstance(one, str) else one for one in self.texts]


_ALIASES: dict[object, str] = {"k": "size"}
"""Other names of fields, which are not known beside the fields themselves."""
_FIELDS = frozenset(
    name
    for kind in (SearchBody, EmbedBody, RerankBody, Match, MatchedField, MatchedText, TitledText)
    for field, info in kind.model_fields.items()
    for name in (field, info.alias or field)
)


def read_body(raw: bytes, kind: type[B]) -> B:
    """Read a body.

    Args:
        raw: What was sent.
        kind: What it must be.

    Raises:
        Refused: It is no JSON (400), or of another form (422); all problems are named.
    """
    if not raw.strip():
        raise Refused(400, "the body is empty: expected JSON", "validation")
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise refusal_of(error, kind) from None


def refusal_of(error: ValidationError, kind: type[Body]) -> Refused:
    """Return what is answered to a request of another form than expected.

    Args:
        error: All that is wrong.
        kind: What it must be.
    """
    problems = error.errors(include_url=False)
    if problems[0]["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {problems[0]['msg'].removeprefix('Invalid JSON: ')}", "validation")
    # A field that may be of several forms has a problem for each: told together, under its name.
    expected: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    told: list[str] = []
    for problem in problems:
        *inside, last = problem["loc"] or ("",)
        where = _joined([*inside, last])
        if problem["type"] == "missing":
            told.append(f"{where} is missing")
        elif problem["type"] == "extra_forbidden":
            told.append(_not_known(_joined(inside), last, kind))
        else:
            expected.setdefault(where or "the body", []).append(expected_of(problem))
            values.setdefault(where or "the body", problem["input"])
    wrong = [f"{where}: expected {' or '.join(expected[where])}, got {_shown(values[where])}" for where in expected]
    found = [*wrong, *told]
    more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
    return Refused(422, "; ".join(found[:_SHOWN_PROBLEMS]) + more, "validation")


def _joined(place: Sequence[object]) -> str:
    """Name a field by the way to it, without the names of forms, which clients do not know."""
    return ".".join(str(part) for part in place if part in _FIELDS or isinstance(part, int))


def _not_known(inside: str, name: object, kind: type[Body]) -> str:
    """Say that a field is not known, and at the top of a body which ones are."""
    if inside:
        return f"{inside} takes no field {_shown(name)}"
    if name in _ALIASES:
        return f"{_ALIASES[name]} and {name} are one: give one of them"
    fields = [info.alias or field for field, info in kind.model_fields.items()]
    return f"there is no field {_shown(name)}: expected {', '.join(fields)}"


def _shown(value: object) -> str:
    """Show a value of a client's, shortened, as ASCII."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value if not isinstance(value, str) else value[: _SHOWN_CHARACTERS + 1])
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
