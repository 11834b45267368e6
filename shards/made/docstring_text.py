"""From a docstring as it stands in the source to a query and a document in plain words.

The query is the summary sentence, the document the rest; markup, signatures and rulers go, and what is left is judged
on whether a person could have typed the query, and could learn something from the document.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 28
MIN_BODY_WORDS = 12
MAX_BODY_CHARACTERS = 1500

_MARKUP: list[tuple[re.Pattern[str], str]] = [
    # Sphinx roles: :class:`~package.Name` and :func:`label <target>`
    (re.compile(r":[A-Za-z][\w.+:-]*:`~(?:[^`<]*\.)?([^`<.]+)`"), r"\1"),
    (re.compile(r":[A-Za-z][\w.+:-]*:`!?([^`<]+?)\s*(?:<[^`>]*>)?`"), r"\1"),
    # Markdown: [label](address), [`name`] and the doc-builder's [[...]]
    (re.compile(r"\[([^\[\]]+)\]\((?:[^()\s]|\([^()]*\))*\)"), r"\1"),
    (re.compile(r"\[`~?([^`]*)`\](?:_|\[[^\]]*\])?"), r"\1"),
    # Links of reStructuredText: `label <address>`_ , `label`_ and [1]_
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r"\[#?\w+\]_"), ""),
    (re.compile(r"(`{1,3})([^`]+)\1_{0,2}"), r"\2"),
    (re.compile(r"(?<![\w*])(\*{1,3})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"</?[A-Za-z][\w-]*(?:\s[^<>]*)?>"), ""),
    (re.compile(r"\|(\w+)\|"), r"\1"),
    (re.compile(r"\\([`*_|~\\ ])"), r"\1"),
    # Fields such as `:param int size: ...` and `:return: ...`
    (
        re.compile(r"(?m)^(\s*):(?:param|keyword|arg|ivar|cvar|var|raises?|exception)\s+(?:[^:\n]*\s)?~?([\w.*]+):"),
        r"\1\2:",
    ),
    (re.compile(r"(?m)^(\s*):(return|yield)s?:"), r"\1Returns:"),
    # What introduces a block of code that is gone.
    (re.compile(r"\s*::(?=\s|$)"), ":"),
]
_DIRECTIVE = re.compile(r"^\s*\.\.\s+([\w.-]+(?::[\w.-]+)?)::\s*(.*)$")
_REMARKS = ("note", "warning", "tip", "important", "caution", "hint", "attention")
# Types of parameters, and fields without a word.
_TYPE_FIELD = re.compile(r"^\s*:(?:type|rtype|vartype|meta)\b.*$", re.IGNORECASE)
_COMMENT = re.compile(r"^\s*\.\.(?:\s+(?:_[^:]*:|\[).*|\s*)$")
_RULER = re.compile(r"^\s*([-=~^*+#\"'`_.]{3,}|[+|][-+=|\s]{3,})\s*$")
_FENCE = re.compile(r"^\s*(?:```|~~~).*$")
_PLACEHOLDER = re.compile(r"(?<!\{)\{[a-z_]\w*\}(?!\})")
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\s*\(.*\)(\s*(->|→|:=|=).{1,80})?:?", re.DOTALL)
_FIELD = re.compile(
    r"\s*(?::(?:param|type|returns?|rtype|raises?|arg|keyword|[ic]?var|meta|yields?)\b|@(?:param|return|type|raise)\b)",
    re.IGNORECASE,
)
# Sections that a docstring may begin with in place of a summary.
_SECTION = re.compile(
    r"(?:args?|arguments|parameters?|params|returns?|yields?|raises|examples?|notes?|usage|attributes|inputs?|outputs?"
    r"|warnings?|caution|todo|fixme|references?|see also|shape|kwargs|options|usage example|methods|keyword arguments"
    r"|other parameters|keyword args)\s*:{0,2}",
    re.IGNORECASE,
)
_SECTION_START = re.compile(rf"\s*{_SECTION.pattern}:\s", re.IGNORECASE)
_LISTING = re.compile(r"\s*(?:>>>|\$ |[-*#] |\d+[.)] )")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|(?<=[a-z)]{2})\.\s*$")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|fig|eq|sec|no|al|ref|refs|dr|mr|incl|w\.r\.t|ca)"
    r"|\b[A-Z])\.$",
    re.IGNORECASE,
)
# How docstrings begin that nobody would look for: pointers elsewhere, remarks to maintainers, generated text.
_UNLIKELY_START = re.compile(
    r"(?:see\b|same as\b|alias\b|deprecated\b|todo\b|fixme\b|xxx\b|hack\b|test(?:s|ing)?\b|copyright\b|licen[sc]e"
    r"|this (?:is )?(?:test|file|docstring|method is (?:called|used|overrid)|function is (?:called|used))"
    r"|auto-?generated|automatically generated|overrid|overload|inherit|implements? (?:the )?(?:abstract|base|inter)"
    r"|note(?:s)?\b|warning\b|experimental\b|internal\b|private\b|do not\b|don't\b|for internal\b|not implemented"
    r"|dummy\b|mock\b|wrapper (?:for|around|of)\b|subclass(?:es)?\b|base class\b|abstract\b|please\b|stub\b|refer\b"
    r"|like \w+[,.]?|called (?:by|when|from|if)\b|helper\b|utility\b|utilities\b|author|created\b.*\d"
    r"|used (?:by|for|in)\b"
    r"|based on\b|adapted from|equivalent to\b|equiv\b|shorthand\b|convenience\b|usage\b|example|version\b|the same\b)",
    re.IGNORECASE,
)
_ANNOUNCEMENT = re.compile(
    r"this (?:is an? (?:\w+ )?)?"
    r"(?:class|function|method|module|object|routine|package|decorator|context manager|property|operator)"
    r"(?: (?:can be|is|may be|should be) used (?:to|for)| allows? (?:you )?to| is(?= an?\b)| will| for| to"
    r"| that| which)? ",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(
    r"(?:\be\.g|\bi\.e|\betc|[,(-]|\b(?:as|as follows|following|is|are|of|by|and|or|to|the|a))$", re.I
)
_CODE_SIGN = re.compile(r"[{}|\\@<>$]|==|:=|->|=>|\w=\w|::|\(\)|https?:|\w/\w+/|\w\(\w*,|\d{4,}|--\w|[A-Za-z_]\w*\[")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*|\d+(?:\.\d+)?")
_NAME_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_EMPTY_WORDS = {
    "a",
    "an",
    "and",
    "are",
    "as",
    "at",
    "be",
    "by",
    "class",
    "create",
    "creates",
    "for",
    "from",
    "function",
    "get",
    "gets",
    "given",
    "if",
    "in",
    "instance",
    "is",
    "it",
    "its",
    "method",
    "new",
    "object",
    "of",
    "on",
    "or",
    "return",
    "returns",
    "set",
    "sets",
    "that",
    "the",
    "these",
    "this",
    "those",
    "to",
    "value",
    "values",
    "when",
    "whether",
    "which",
    "with",
}


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Cut a docstring into its summary sentence and the rest, both in plain words.

    Args:
        docstring: As in the source, indentation included.

    Returns:
        Summary, without its full stop, and body, at most `MAX_BODY_CHARACTERS` long; None where there is no summary.
    """
    paragraphs = [] if _FIELD.match(docstring) else _paragraphs(docstring)
    while paragraphs and _SIGNATURE.fullmatch(paragraphs[0]):
        paragraphs = paragraphs[1:]
    if not paragraphs or _begins_with_section(paragraphs[0]):
        return None
    summary, remainder = _first_sentence(" ".join(paragraphs[0].split()))
    body = " ".join(" ".join([remainder, *paragraphs[1:]]).split())
    if len(body) > MAX_BODY_CHARACTERS:
        body = body[:MAX_BODY_CHARACTERS].rsplit(" ", 1)[0]
    return _imperative(summary.strip().rstrip(".:; ")), body


def is_useful(summary: str, body: str, qualified_name: str) -> bool:
    """Judge whether a summary could be a search, and a body its answer.

    Args:
        summary: The query, as `split_docstring` returns it.
        body: The document's text, likewise.
        qualified_name: The document's title.
    """
    words = _WORD.findall(summary)
    if not MIN_QUERY_WORDS <= len(words) <= MAX_QUERY_WORDS or _num_words(body) < MIN_BODY_WORDS:
        return False
    if (
        not summary[0].isalpha()
        or not summary.isascii()
        or _CODE_SIGN.search(summary)
        or _UNLIKELY_START.match(summary)
    ):
        return False
    if _UNFINISHED.search(summary):
        return False
    letters = sum(character.isalpha() or character == " " for character in summary)
    if letters < 0.85 * len(summary) or summary.isupper():
        return False
    # At least two words of meaning, and one of them more than the name says.
    content = {_stem(word) for word in words} - {_stem(word) for word in _EMPTY_WORDS}
    return len(content) >= 2 and bool(content - {_stem(part) for part in _NAME_PART.findall(qualified_name)})


def normal_form(text: str) -> str:
    """Reduce a text to its words in lower case, so that texts which differ in signs and spacing alone are equal."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _begins_with_section(paragraph: str) -> bool:
    first, *_ = paragraph.split("\n", 1)
    return bool(_SECTION.fullmatch(first.strip()) or _SECTION_START.match(first) or _LISTING.match(first))


def _paragraphs(docstring: str) -> list[str]:
    text = "\n".join(_without_empty_sections(list(_prose_lines(docstring))))
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return [stripped for block in re.split(r"\n\s*\n", text) if (stripped := block.strip())]


def _prose_lines(docstring: str) -> Iterator[str]:
    """Yield the lines that hold words: no directives, no code of examples and what it prints, no rulers."""
    skipped_indent: int | None = None
    in_example = in_fence = False
    for line in inspect.cleandoc(docstring).split("\n"):
        if _FENCE.match(line):
            in_fence = not in_fence
            continue
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        indent = len(line) - len(line.lstrip())
        if skipped_indent is not None and line.strip() and indent <= skipped_indent:
            skipped_indent = None
        if in_example or in_fence or (skipped_indent is not None and line.strip()):
            continue
        if directive := _DIRECTIVE.match(line):
            if directive[1].lower() in _REMARKS:
                yield from ("", f"{directive[1].capitalize()}: {directive[2]}")
            else:  # formulas, code, figures, version notes: no words to search by
                skipped_indent = indent
                yield ""
        elif not (_COMMENT.match(line) or _RULER.match(line) or _TYPE_FIELD.match(line)):
            yield _PLACEHOLDER.sub("", line)


def _without_empty_sections(lines: list[str]) -> list[str]:
    """Drop headings that nothing is left under."""
    kept: list[str] = []
    indent_below = -1  # of the next line that has words; a heading has none
    for place, line in reversed([*enumerate(lines)]):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        is_heading = place > 0 and _SECTION.fullmatch(text) is not None  # the first line shows no indentation
        # What belongs to `Args:` is indented; what belongs to a heading that was underlined is not.
        if is_heading and indent_below < indent + text.endswith(":"):
            continue
        if text:
            indent_below = -1 if is_heading else indent
        kept.append(line)
    return kept[::-1]


def _first_sentence(paragraph: str) -> tuple[str, str]:
    for end in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[: end.start()]):
            return paragraph[: end.start()], paragraph[end.end() :]
    return paragraph, ""


def _num_words(text: str) -> int:
    return sum(word.strip("\"'(),.:;!?-").replace("-", "").isalpha() for word in text.split())


def _imperative(summary: str) -> str:
    """Leave out the words that only say that something is described."""
    shorter = _ANNOUNCEMENT.sub("", summary)
    return shorter[:1].upper() + shorter[1:]


def _stem(word: str) -> str:
    """Fold the forms of a word that docstrings put beside a name: `splits` for `split`, `computing` for `compute`."""
    word = word.lower()
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
