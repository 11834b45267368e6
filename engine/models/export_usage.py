"""How an exported model is used, in code that runs as it stands: the part of a README that every kind of model has.

A test takes the snippets out of what is written here and runs them on the export. Where a model is to be published, its
name on the hub stands in them in place of a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.models.dual import DOCUMENT, QUERY, SHARED
from engine.models.export_ranker import prior_told
from engine.models.source import HEAD, POOLER, TRANSFORMER
from engine.models.yes_no import YES_NO
from shards.files import read_json
from shards.records import Document
from shards.writer import render

FOLDER = "this/folder"
"""What stands in the snippets for the place of the export, unless another is told."""
ONNX, ONNX_RECORD = "onnx", "about.json"
"""Folder of an export with what onnxruntime reads, or of a tower in it; and what is said of the graph beside it."""
ONNX_FILES = {"retriever": "embedding.onnx", "lexical": "weights.onnx", "ranker": "score.onnx"}
"""The graph by the kind of model. Not `model.onnx`, by which sentence-transformers means token states."""
_ENCODED = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""How tokenizers calls what a model takes."""
_QUERY = "what is a container?"
_DOCUMENTS = (
    Document("", "Containers", "Lists, tuples and dictionaries hold other objects."),
    Document("", "", "Another one."),
)
_POOLED = {
    "cls": "states[:, 0]",
    "last": 'states[torch.arange(len(states)), batch["attention_mask"].cumsum(1).argmax(1)]',
    "mean": '(states * batch["attention_mask"][..., None]).sum(1) / batch["attention_mask"].sum(1, keepdim=True)',
}
_CLASSES = {
    "retriever": ("SentenceTransformer", "AutoModel"),
    "lexical": ("SparseEncoder", "AutoModelForMaskedLM"),
    "ranker": ("CrossEncoder", "AutoModelForSequenceClassification"),
}


def title_of(metadata: Mapping[str, Any]) -> str:
    """Return what an exported model is, in a line.

    Args:
        metadata: What was written down beside its weights.
    """
    towers = "one encoder for both sides" if metadata.get("tied") else "one encoder in `query/`, one in `document/`"
    head = {
        "cls": ": a linear layer on the first token's state",
        "last": ": a linear layer on the last token's state",
        "mean": ": a linear layer on the mean of all states",
        YES_NO: " that asks a language model",
    }
    return {
        "retriever": f"A dense retriever: {towers}",
        "lexical": f"A lexical retriever (SPLADE-max): {towers}",
        "ranker": f"A cross-encoder ranker{head.get(metadata.get('head', POOLER), '')}",
    }.get(metadata["model"], "An encoder, pre-trained with a bottleneck")


def usage_of(folder: Path, metadata: Mapping[str, Any], place: str = FOLDER) -> str:
    """Return the section on how a model is used: what it reads and gives, and snippets for each library.

    Args:
        folder: The export, whose other files are written.
        metadata: What was written down beside its weights.
        place: What is loaded in the snippets: a folder, or a name on the hub.

    Returns:
        Markdown, from its heading on.
    """
    kind = metadata["model"]
    if kind not in _CLASSES:
        return f"## Usage\n\n{_masked_lm(metadata, place)}"
    library, plain = _sentence_transformers(metadata, place), _TRANSFORMERS[kind](folder, metadata, place)
    parts = ["## Usage", _told(metadata), "With sentence-transformers:", library, "With transformers alone:", plain]
    if (folder / ONNX).is_dir():
        parts += [
            f"With onnxruntime, without torch (the `tokenizer.json` below `{ONNX}` cuts and pads):",
            _onnx(folder, metadata, place),
        ]
    if kind == "ranker" and (told := prior_told(metadata).strip()):
        parts.append(told)
    return "\n\n".join(parts) + "\n"


def readme(folder: Path, metadata: Mapping[str, Any]) -> str:
    """Return the README of an export of which no more is known than what lies in it."""
    return f"# {title_of(metadata)}\n\n{usage_of(folder, metadata)}"


def _told(metadata: Mapping[str, Any]) -> str:
    given = f"A document is given as `{metadata.get('template', '{text}')}`."
    given += "".join(f" A {side} begins with `{text}`." for side, text in metadata.get("prompts", {}).items())
    lengths = f"{metadata.get('query_max_length')} and documents of {metadata['max_length']} tokens at most"
    if metadata["model"] == "retriever":
        above = "".join(f" Dense layers above it: {', '.join(own)}." for own in metadata.get("dense", {}).values())
        form = f"Pooling: {metadata['pooling']}.{above} Similarity: {metadata['similarity']}."
        return f"{form} {given} Trained on queries of {lengths}."
    if metadata["model"] == "lexical":
        form = (
            "A word's weight is the maximum over a text's tokens of log(1 + relu(logit)); a score is the inner product."
        )
        return f"{form} {given} Trained on queries of {lengths}."
    if metadata.get("head") == YES_NO:
        return _told_of_answers(metadata, given)
    told = f"Scores are raw logits, without a sigmoid. {given} Query and document together: "
    told += f"{metadata['max_length']} tokens at most."
    if metadata.get("head", POOLER) != POOLER:
        told += (
            "\nThis is not what transformers calls a model for sequence classification (there is no pooler): do not "
            "load it as one.\nA `CrossEncoder` of this form needs sentence-transformers 6 or newer."
        )
    return told


def _told_of_answers(metadata: Mapping[str, Any], given: str) -> str:
    yes, no = metadata["answers"]
    return f"""The score is the model's logit of `{yes}` less its logit of `{no}` behind these words (a sigmoid makes a
probability of it); it needs sentence-transformers 6 or newer:

```text
{metadata["pair_template"]}
```

{given} A pair has {metadata["max_length"]} tokens at most, of which the document's last ones are left out."""


def _sentence_transformers(metadata: Mapping[str, Any], place: str) -> str:
    kind, (name, _) = metadata["model"], _CLASSES[metadata["model"]]
    if kind == "ranker":
        use = "scores = model.predict([(queries[0], document) for document in documents])"
    else:
        use = "scores = model.similarity(model.encode_query(queries), model.encode_document(documents))"
    lines = [f"from sentence_transformers import {name}", "", *_texts(metadata), f'model = {name}("{place}")', use]
    return _python(lines)


def _dense(folder: Path, metadata: Mapping[str, Any], place: str) -> str:
    layers = metadata.get("dense", {})
    tower = "" if metadata["tied"] else ", tower"
    source = ["folder", *_local("folder", place)] if layers else [f'"{place}"']
    where = source[0] if metadata["tied"] else f"{source[0]}, subfolder=tower"
    lines = ["import torch", *(["from safetensors.torch import load_file"] if layers else [])]
    lines += ["from transformers import AutoModel, AutoTokenizer", "", *_texts(metadata), *source[1:], "", ""]
    lines += [
        f"def encode(texts{tower}{', layers' if layers else ''}):",
        f"    tokenizer, model = AutoTokenizer.from_pretrained({where}), AutoModel.from_pretrained({where}).eval()",
        '    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")',
        "    with torch.inference_mode():",
        "        states = model(**batch).last_hidden_state",
        f"    vectors = {_POOLED[metadata['pooling']]}",
    ]
    if layers:
        lines += [
            "    for path, activation in layers:",
            '        layer = load_file(f"{folder}/{path}/model.safetensors")',
            '        vectors = vectors @ layer["linear.weight"].T + layer.get("linear.bias", 0)',
            "        vectors = activation(vectors)",
        ]
    unit = metadata["similarity"] == "cosine"
    lines += ["    return torch.nn.functional.normalize(vectors, dim=-1)" if unit else "    return vectors", "", ""]
    encoded = {
        side: ", ".join(
            [
                _prompted(metadata, side),
                *([] if metadata["tied"] else [f'"{side}"']),
                *([_layers(folder, layers.get(SHARED if metadata["tied"] else side, []))] if layers else []),
            ]
        )
        for side in (QUERY, DOCUMENT)
    }
    return _python([*lines, f"scores = encode({encoded[QUERY]}) @ encode({encoded[DOCUMENT]}).T"])


def _lexical(folder: Path, metadata: Mapping[str, Any], place: str) -> str:
    tower = "" if metadata["tied"] else ", tower"
    where = f'"{place}"' if metadata["tied"] else f'"{place}", subfolder=tower'
    encoded = {
        side: _prompted(metadata, side) + ("" if metadata["tied"] else f', "{side}"') for side in (QUERY, DOCUMENT)
    }
    lines = [
        "import torch",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        *_texts(metadata),
        "",
        "",
        f"def encode(texts{tower}):",
        f"    tokenizer = AutoTokenizer.from_pretrained({where})",
        f"    model = AutoModelForMaskedLM.from_pretrained({where}).eval()",
        '    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")',
        "    with torch.inference_mode():",
        "        logits = model(**batch).logits",
        '    logits = logits.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf)',
        "    return logits.amax(1).relu().log1p()",
        "",
        "",
        f"scores = encode({encoded[QUERY]}) @ encode({encoded[DOCUMENT]}).T",
    ]
    return _python(lines)


def _ranker(folder: Path, metadata: Mapping[str, Any], place: str) -> str:
    form = metadata.get("head", POOLER)
    if form == YES_NO:
        return _answers(metadata, place)
    pairs = "batch = tokenizer(queries * len(documents), documents, "
    batch = f'{pairs}padding=True, truncation=True, return_tensors="pt")'
    if form == POOLER:
        lines = [
            "import torch",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            *_texts(metadata),
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
            f'model = AutoModelForSequenceClassification.from_pretrained("{place}").eval()',
            batch,
            "with torch.inference_mode():",
            "    scores = model(**batch).logits[:, 0]",
        ]
        return _python(lines)
    lines = [
        "import torch",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        *_texts(metadata),
        *_local("folder", place),
        f'tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/{TRANSFORMER}")',
        f'model = AutoModel.from_pretrained(f"{{folder}}/{TRANSFORMER}").eval()',
        f'head = load_file(f"{{folder}}/{HEAD}/model.safetensors")',
        batch,
        "with torch.inference_mode():",
        "    states = model(**batch).last_hidden_state",
        f"pooled = {_POOLED[form]}",
        'scores = pooled @ head["linear.weight"][0] + head["linear.bias"]',
    ]
    return _python(lines)


def _answers(metadata: Mapping[str, Any], place: str) -> str:
    lines = [
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *_texts(metadata),
        f'tokenizer = AutoTokenizer.from_pretrained("{place}", padding_side="left")',
        f'model = AutoModelForCausalLM.from_pretrained("{place}").eval()',
        'query = {"role": "query", "content": queries[0]}',
        'pairs = [[query, {"role": "document", "content": document}] for document in documents]',
        'batch = tokenizer.apply_chat_template(pairs, padding=True, return_tensors="pt", return_dict=True)',
        "with torch.inference_mode():",
        "    logits = model(**batch).logits[:, -1]",
        f"yes, no = tokenizer.convert_tokens_to_ids({json.dumps(metadata['answers'])})",
        "scores = logits[:, yes] - logits[:, no]",
    ]
    return _python(lines)


_TRANSFORMERS = {"retriever": _dense, "lexical": _lexical, "ranker": _ranker}


def _masked_lm(metadata: Mapping[str, Any], place: str) -> str:
    lines = [
        "from transformers import AutoModel, AutoModelForMaskedLM",
        "",
        f'encoder = AutoModel.from_pretrained("{place}")',
        f'masked_lm = AutoModelForMaskedLM.from_pretrained("{place}")',
    ]
    base = str(metadata.get("base", "another model"))
    base = {"random": "random weights"}.get(base, Path(base).name if Path(base).is_absolute() else base)
    return f"""Pre-trained from {base} on texts of {metadata["max_length"]} tokens
at most; a document is given as `{metadata.get("template", "{text}")}`. Its first state holds the text; it is meant to
be fine-tuned as a retriever or a ranker. The layers above it that it was trained with are left out.

{_python(lines)}
"""


def _onnx(folder: Path, metadata: Mapping[str, Any], place: str) -> str:
    """Six lines, and the one that says where the files are."""
    kind, tied = metadata["model"], metadata.get("tied", True)
    below = ONNX if tied else f"{ONNX}/{QUERY}"
    given = "[(queries[0], document) for document in documents]" if kind == "ranker" else _prompted(metadata, QUERY)
    inputs = [f'"{name}": numpy.array([one.{_ENCODED[name]} for one in batch])' for name in onnx_inputs(folder / below)]
    lines = [
        *_texts(metadata)[: 2 if kind == "ranker" else 1],
        *_local("folder", place),
        "",
        "import numpy, onnxruntime, tokenizers",
        f'tokenizer = tokenizers.Tokenizer.from_file(f"{{folder}}/{below}/tokenizer.json")',
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{below}/{ONNX_FILES[kind]}")',
        f"batch = tokenizer.encode_batch({given})",
        f"inputs = {{{', '.join(inputs)}}}",
        f"{'scores' if kind == 'ranker' else 'vectors'} = session.run(None, inputs)[0]",
    ]
    more = "" if tied else f"\n\nDocuments go through `{ONNX}/{DOCUMENT}` in the same way."
    return _python(lines) + more


def onnx_inputs(folder: Path) -> list[str]:
    """Return the names of what an exported graph takes, in its order.

    Args:
        folder: Holds the graph and what is said of it.
    """
    return list(read_json(folder / ONNX_RECORD, "the description of an ONNX file")["inputs"])


def _texts(metadata: Mapping[str, Any]) -> list[str]:
    template = metadata.get("template", "{text}")
    texts = [render(template, document) for document in _DOCUMENTS]
    return [f"queries = {json.dumps([_QUERY])}", f"documents = {json.dumps(texts, ensure_ascii=False)}"]


def _prompted(metadata: Mapping[str, Any], side: str) -> str:
    texts, prompt = {QUERY: "queries", DOCUMENT: "documents"}[side], metadata.get("prompts", {}).get(side)
    return f"[{json.dumps(prompt, ensure_ascii=False)} + text for text in {texts}]" if prompt else texts


def _layers(folder: Path, paths: list[str]) -> str:
    pairs = []
    for path in paths:
        activation = read_json(folder / path / "config.json", "a Dense layer")["activation_function"]
        pairs.append(f'("{path}", torch.nn.{activation.rpartition(".")[2]}())')
    return f"[{', '.join(pairs)}]"


def _local(name: str, place: str) -> list[str]:
    """Return lines by which files of an export are reached one by one."""
    if place == FOLDER:
        return [f'{name} = "{place}"']
    return ["from huggingface_hub import snapshot_download", "", f'{name} = snapshot_download("{place}")']


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
