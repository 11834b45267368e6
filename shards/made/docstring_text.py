"""From a docstring to a query and a document in plain words, and whether a person could have typed the query."""

from __future__ import annotations

import re

MIN_QUERY_WORDS, MAX_QUERY_WORDS, MIN_BODY_WORDS = 4, 28, 12
MAX_BODY_CHARACTERS = 1500

# What holds no words to search by: examples and what they print, code, formulas, comments, rulers, types of parameters.
_WORDLESS = re.compile(
    r"""^[ ]*(?:(?:>>>|```|~~~).*(?:\n[ ]*(?!```|~~~)\S.*)*(?:\n[ ]*(?:```|~~~))?
    |examples?[ ]*:{0,2}[ ]*$ | [-=~^*+#"'`_.|]{3,}[ ]*$ | :(?:r?type|vartype|meta)\b.* | \.\.(?:[ ](?:_|\[).*)?$)
    |^([ ]*)\.\.[ ](?!note|warning|tip|important)[\w.:-]+::.*(?:\n(?:\1[ ]+.*|[ ]*$))*""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_MARKUP = [
    (re.compile(r":[A-Za-z][\w.+:-]*:`(?:!|~(?:[^`<]*\.)?)?([^`<]+?)\s*(?:<[^`>]*>)?`"), r"\1"),  # :class:`~a.Name`
    (re.compile(r"\[([^\[\]]+)\]\([^()\s]*\)|`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1\2"),  # links with an address
    (re.compile(r"\[#?\w+\]_|</?[A-Za-z][\w-]*(?:\s[^<>]*)?>|(?<!\{)\{[a-z_]\w*\}(?!\})"), ""),  # references, tags
    (re.compile(r"\[?(`{1,3})~?([^`]+)\1(?:\]\[[^\]]*\]|\]|_{1,2})?"), r"\2"),
    (re.compile(r"(?<![\w*])(\*{1,3})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"\\([`*_|~\\ ])"), r"\1"),
    (re.compile(r"(?m)^( *):(?:param|keyword|arg|[ic]?var|raises?)\s+(?:[^:\n]*\s)?~?([\w.*]+):"), r"\1\2:"),
    (re.compile(r"(?m)^( *):returns?:"), r"\1Returns:"),
    (re.compile(r"\.\. (?=\w+::)"), ""),
    (re.compile(r"\s*::(?=\s|$)"), ":"),
]
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\s*\(.*\)(\s*(->|→|:=|=).{1,80})?:?", re.DOTALL)
_SECTION = re.compile(
    r"(?:(?:other |keyword )?(?:arg(?:ument)?|param(?:eter)?|kwarg)s?|returns?|yields?|raises|examples?|notes?|usage"
    r"|attributes|inputs?|outputs?|warnings?|todo|references?|see also|shape|options|methods) *(?::.*)?$",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\b[A-Z])[.!?][\"')\]]*(?:\s+(?=[\"'(\[]*[A-Z0-9])|$)"
)
_ANNOUNCEMENT = re.compile(
    r"this (?:is an? (?:\w+ )?)?(?:class|function|method|module|object|package|decorator|context manager|operator)"
    r"(?: (?:can be|is|may be|should be) used (?:to|for)| allows? (?:you )?to| is(?= an?\b)| will| for| to| that)? ",
    re.IGNORECASE,
)
# How docstrings begin that nobody would look for: pointers elsewhere, remarks to maintainers, generated text.
_UNLIKELY_START = re.compile(
    r"(?:see|same as|alias|deprecated|todo|fixme|xxx|hack|test(?:s|ing)?|copyright|licen[sc]e|dummy|mock|usage|this"
    r"|auto(?:matically |-)?generated|overrid\w*|overload\w*|inherit\w*|implements? (?:the )?(?:abstract|base|inter\w*)"
    r"|notes?|warning|experimental|internal|private|do not|don't|for internal|not implemented|wrapper (?:for|around|of)"
    r"|subclass(?:es)?|base class|abstract|please|stub|refer|like|called (?:by|when|from|if)|helper|utilit(?:y|ies)"
    r"|author|used (?:by|for|in)|based on|adapted from|equiv(?:alent to)?|shorthand|convenience|examples?|version"
    r"|the same)\b",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"(?:\be\.g|\bi\.e|\betc|[,(-]|\b(?:as|follow(?:s|ing)|is|are|of|by|and|or|to|the|a))$", re.I)
_CODE_SIGN = re.compile(r"[{}|\\@<>$]|==|:=|->|=>|\w=\w|::|\(\)|https?:|\w/\w+/|\w\(\w*,|\d{4,}|--\w|[A-Za-z_]\w*\[")
_NAME_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_EMPTY_WORDS = "class create function given instance method object return value when whether".split()  # noqa: SIM905


def split_docstring(docstring: str) -> tuple[str, str]:
    """Cut a docstring into its first sentence and the rest, both in plain words.

    Args:
        docstring: As `inspect.cleandoc` returns it.

    Returns:
        The sentence, without its full stop and empty where there is none, and the rest, cut to `MAX_BODY_CHARACTERS`.
    """
    text = _WORDLESS.sub("", docstring)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    paragraphs = [stripped for block in re.split(r"\n\s*\n", text) if (stripped := block.strip())]
    while paragraphs and _SIGNATURE.fullmatch(paragraphs[0]):
        paragraphs = paragraphs[1:]
    if not paragraphs or docstring[0] == ":" or _SECTION.match(paragraphs[0]):
        return "", ""
    first = " ".join(paragraphs[0].split())
    end = _SENTENCE_END.search(first)
    query, rest = (first[: end.start()], first[end.end() :]) if end else (first, "")
    query = _ANNOUNCEMENT.sub("", query).rstrip(".:; ")
    body = " ".join(" ".join([rest, *paragraphs[1:]]).split())
    if len(body) > MAX_BODY_CHARACTERS:
        body = body[:MAX_BODY_CHARACTERS].rsplit(" ", 1)[0]
    return query[:1].upper() + query[1:], body


def is_useful(query: str, body: str, qualified_name: str) -> bool:
    """Judge whether a query could be a search, and a body its answer.

    Args:
        query: As `split_docstring` returns it.
        body: The document's text, likewise.
        qualified_name: The document's title.
    """
    words = re.findall(r"[A-Za-z][A-Za-z'-]*|\d+(?:\.\d+)?", query)
    num_body_words = sum(word.strip("\"'(),.:;!?-").replace("-", "").isalpha() for word in body.split())
    if not MIN_QUERY_WORDS <= len(words) <= MAX_QUERY_WORDS or num_body_words < MIN_BODY_WORDS:
        return False
    letters = sum(character.isalpha() or character == " " for character in query)
    if not (query.isascii() and query[0].isalpha() and letters >= 0.85 * len(query)) or query.isupper():
        return False
    if _CODE_SIGN.search(query) or _UNLIKELY_START.match(query) or _UNFINISHED.search(query):
        return False
    # At least two words of meaning, and one of them more than the name says.
    content = {_stem(word) for word in words if len(word) > 3} - {_stem(word) for word in _EMPTY_WORDS}
    return len(content) >= 2 and bool(content - {_stem(part) for part in _NAME_PART.findall(qualified_name)})


def normal_form(text: str) -> str:
    """Reduce a text to its words in lower case, so that texts which differ in signs and spacing alone are equal."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _stem(word: str) -> str:
    return re.sub(r"(?<=\w{3})(?:ing|ed|es|s|e)$", "", word.lower())
