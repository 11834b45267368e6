"""What a sentence-transformers folder says: the chain of modules from a text to its embedding, and their settings.

Such a folder is more than its transformer. modules.json lists a chain of modules, a Router has one for queries and one
for documents, and each module has settings of its own. All of it is read here, in the forms that the library's versions
2 to 6 write, and nothing is filled in by guess: a module, a setting or a chain that no retriever of ours computes is
refused by its name. `engine.models.start` compares what is read with a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from engine.errors import ArtifactError, ModelError
from engine.models.projection import ACTIVATIONS, EMBEDDING, DenseLayer
from shards.errors import listed
from shards.files import read_json

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
SIDES = ("query", "document")
TRANSFORMERS = ("Transformer", "MLMTransformer")
"""The modules around a model of transformers; the second is how version 5 called that of a sparse encoder."""
ALONE = "copy its transformer (config.json, weights, tokenizer) into a folder without modules.json, and name that"
"""A remedy: what is above the transformer is then the recipe's."""

_PACKAGE = "sentence_transformers."
_ROUTERS = ("Router", "Asym")
_ROUTER_FILES = ("router_config.json", "config.json")
"""A Router's, and that of Asym, as it was called up to version 4."""
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLINGS = {"lasttoken": "last"}
"""The library's names of poolings for which a recipe has others."""
_LOADING = {
    "model_kwargs": {"add_pooling_layer", "attn_implementation", "device_map", "dtype", "low_cpu_mem_usage"}
    | {"torch_dtype", "trust_remote_code", "use_safetensors"},
    "processor_kwargs": {"model_max_length", "padding_side", "trust_remote_code", "use_fast"},
    "config_kwargs": {"trust_remote_code"},
}
"""Settings of how a transformer is loaded, and those of them that change no embedding of ours."""
_OLD_LOADING = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
_KNOWN = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"} | {
    "unpad_inputs"
}
_EMBEDS, _FILLS_MASKS = "feature-extraction", "fill-mask"
_LISTED = 3
_NO_LIMIT = 1_000_000
"""A tokenizer without a length says a number far above this one."""


class Module(NamedTuple):
    """A module of a chain: its class's name, and its folder below the model's."""

    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Tower:
    """How one side's texts become embeddings.

    Attributes:
        transformer: The transformer's folder, below the model's; empty for the model's own.
        task: What the transformer is for, such as `feature-extraction` or `sequence-classification`.
        pooling: What is made of its last layer, one after the other; empty where nothing says so.
        include_prompt: Whether a prompt's tokens are pooled too.
        dense: Layers above the pooling.
        normalize: Whether embeddings are made unit vectors; None where nothing says so.
        max_length: Tokens of an input; None where nothing says so.
        lower_case: Whether texts are made lower case before they are tokenised.
    """

    transformer: str = ""
    task: str = "feature-extraction"
    pooling: tuple[str, ...] = ()
    include_prompt: bool = True
    dense: tuple[DenseLayer, ...] = ()
    normalize: bool | None = None
    max_length: int | None = None
    lower_case: bool = False


@dataclass(frozen=True, slots=True)
class Chains:
    """The modules that a text goes through, for each side.

    Attributes:
        sides: Modules of a query and of a document, which are the same without a Router.
        model_type: The library's class that the folder was saved from.
        settings: What stands beside the modules: prompts, similarity, and so on.
    """

    sides: Mapping[str, tuple[Module, ...]]
    model_type: str
    settings: Mapping[str, Any]


def is_sentence_transformers(folder: Path) -> bool:
    """Tell whether a folder has the library's list of modules."""
    return (folder / MODULES_FILE).is_file()


def transformer_folders(folder: Path) -> tuple[str, ...]:
    """Return where the transformers of a folder are, below it: one, or one for each side of a Router.

    Raises:
        ModelError: Its modules are listed in no known form.
        ArtifactError: A file is missing or damaged.
    """
    chains = read_chains(folder).sides.values()
    return tuple(dict.fromkeys(one.path for chain in chains for one in chain if one.kind in TRANSFORMERS))


def read_chains(folder: Path) -> Chains:
    """Read which modules a folder has.

    Args:
        folder: Holds modules.json.

    Raises:
        ModelError: They are listed in no known form, a module is no part of the library, or a Router has other routes
            than one for queries and one for documents.
        ArtifactError: A file is missing or damaged.
    """
    listing = _read(folder / MODULES_FILE, "the list of modules")
    if not isinstance(listing, list) or not all(isinstance(one, dict) for one in listing):
        _refuse_form(folder / MODULES_FILE)
    modules = [_module(folder, one.get("type"), one.get("path", "")) for one in listing]
    settings = _settings(folder / SETTINGS_FILE)
    sides = {side: _flat(folder, modules, side) for side in SIDES}
    return Chains(sides, str(settings.get("model_type") or "SentenceTransformer"), settings)


def read_tower(folder: Path, chain: Sequence[Module]) -> Tower:
    """Read one side's modules.

    Args:
        folder: The model's.
        chain: The side's, as `read_chains` gave them.

    Raises:
        ModelError: It is no chain of a transformer, a pooling, any number of Dense layers and perhaps a normalisation;
            or a module has a setting that is not kept.
        ArtifactError: A file is missing or damaged.
    """
    kinds = [one.kind for one in chain]
    strange = [one for one in chain if one.kind not in ("Transformer", "Pooling", "Dense", "Normalize")]
    if strange:
        named = listed([f"{one.kind} ({one.path})" if one.path else one.kind for one in strange], _LISTED)
        raise ModelError(
            f"{folder} has the module {named}, which no retriever here computes",
            expected="a Transformer, a Pooling, any Dense layers, and a Normalize or none",
            remedy=f"name a model of these modules; or {ALONE}",
        )
    num_dense = kinds.count("Dense")
    in_order = ["Transformer", "Pooling", *["Dense"] * num_dense]
    if kinds[: len(in_order)] != in_order or set(kinds[len(in_order) :]) - {"Normalize"}:
        raise ModelError(
            f"the modules of {folder} are {', '.join(kinds) or 'none'}",
            expected="a Transformer, a Pooling, any Dense layers, and a Normalize or none, in this order",
            remedy=f"name a model of these modules; or {ALONE}",
        )
    task, max_length, lower_case = read_transformer(folder, chain[0].path)
    if task != _EMBEDS:
        raise ModelError(
            f"the transformer of {folder} is one for {task}",
            expected=f"one for {_EMBEDS}, whose last layer is pooled",
            remedy=f"name another model; or {ALONE}",
        )
    pooling, include_prompt = _read_pooling(folder, chain[1].path)
    return Tower(
        transformer=chain[0].path,
        task=task,
        pooling=pooling,
        include_prompt=include_prompt,
        dense=tuple(read_dense(folder, one.path) for one in chain if one.kind == "Dense"),
        normalize="Normalize" in kinds,
        max_length=max_length,
        lower_case=lower_case,
    )


def read_transformer(folder: Path, path: str) -> tuple[str, int | None, bool]:
    """Read the settings of a transformer.

    Args:
        folder: The model's.
        path: The transformer's folder, below it.

    Returns:
        Its task, the tokens of an input (None where nothing says so), and whether texts are made lower case.

    Raises:
        ModelError: It has a setting that is not kept.
        ArtifactError: A file is damaged.
    """
    place = folder / path
    file = _first_of(place, _TRANSFORMER_FILES)
    found = _settings(file)
    renamed = {_OLD_LOADING.get(key, key): value for key, value in found.items()}
    loading = {key: dict(renamed.pop(key, None) or {}) for key in _LOADING}
    strange = [f"{key}={value}" for key, value in renamed.items() if key not in _KNOWN and value]
    strange += [
        f"{kind}.{key}={value}"
        for kind, known in _LOADING.items()
        for key, value in loading[kind].items()
        if key not in known
    ]
    output = renamed.get("module_output_name", "token_embeddings")
    task = str(renamed.get("transformer_task", _EMBEDS))
    text = (renamed.get("modality_config") or {}).get("text") or {}
    if task == _EMBEDS and (output, text.get("method_output_name", "last_hidden_state")) != (
        "token_embeddings",
        "last_hidden_state",
    ):
        strange.append(f"module_output_name={output} from {text.get('method_output_name')}")
    if strange:
        raise ModelError(
            f"{file} sets {listed(strange, _LISTED)}, which is not kept here",
            expected="max_seq_length and do_lower_case alone",
            remedy="take it out of a copy of the folder if the model is to start without it, or name another model",
        )
    stated = renamed.get("max_seq_length") or loading["processor_kwargs"].get("model_max_length")
    return task, _length(stated) or _tokenizer_length(place), bool(renamed.get("do_lower_case"))


def read_splade(folder: Path, chain: Sequence[Module]) -> Tower:
    """Read one side's modules of a sparse encoder.

    Args:
        folder: The model's.
        chain: The side's, as `read_chains` gave them.

    Raises:
        ModelError: It is not a transformer for masked language modelling with a SpladePooling by maximum and relu above
            it, or a module has a setting that is not kept.
        ArtifactError: A file is missing or damaged.
    """
    kinds = [one.kind for one in chain]
    whole = len(kinds) == 2 and kinds[0] in TRANSFORMERS and kinds[1] == "SpladePooling"
    task, max_length, lower_case = read_transformer(folder, chain[0].path) if whole else ("", None, False)
    if not whole or (kinds[0] == "Transformer" and task != _FILLS_MASKS):
        raise ModelError(
            f"one side of {folder} is {', '.join(kinds) or 'empty'}" + (f", for {task}" if task else ""),
            expected="a transformer for fill-mask and a SpladePooling above it, on both sides",
            remedy=f"name a SPLADE of these modules, one whose queries have a model too; or {ALONE}",
        )
    file = folder / chain[1].path / "config.json"
    found = _settings(file)
    pooling = found.get("pooling_strategy", "max"), found.get("activation_function", "relu")
    if pooling != ("max", "relu"):
        raise ModelError(
            f"{file} pools by {pooling[0]} with the activation {pooling[1]}: its weights would be others here",
            expected="the maximum over the tokens, with relu",
            remedy=f"name such a model; or, to train by the maximum from its transformer, {ALONE}",
        )
    return Tower(
        transformer=chain[0].path, task=_FILLS_MASKS, pooling=("max",), max_length=max_length, lower_case=lower_case
    )


def read_dense(folder: Path, path: str, output: str = EMBEDDING) -> DenseLayer:
    """Read what a folder says of a Dense layer.

    Args:
        folder: The model's.
        path: The layer's folder, below it.
        output: What the library must call its result.

    Raises:
        ModelError: It has an activation or a setting that is not kept.
        ArtifactError: Its settings are missing or damaged.
    """
    file = folder / path / "config.json"
    found = _read(file, "the settings of a Dense layer")
    try:
        sizes = int(found["in_features"]), int(found["out_features"])
    except (KeyError, TypeError, ValueError):
        _refuse_form(file)
    activation = str(found.get("activation_function", "torch.nn.modules.activation.Tanh"))
    places = [found.get(key) or EMBEDDING for key in ("module_input_name", "module_output_name")]
    lost = [
        *([] if activation in ACTIVATIONS else [f"the activation_function {activation}"]),
        *([] if places == [EMBEDDING, output] else [f"the module_input_name {places[0]} and output {places[1]}"]),
        *(["a residual (use_residual)"] if found.get("use_residual") else []),
    ]
    if lost:
        raise ModelError(
            f"the Dense layer {path} of {folder} has {listed(lost, _LISTED)}, which is not kept here",
            expected="a layer above the pooling, without a residual, whose activation is one of "
            f"{', '.join(kind.__name__ for kind in ACTIVATIONS.values())}",
            remedy=f"name another model; or {ALONE}",
        )
    return DenseLayer(path, *sizes, bias=bool(found.get("bias", True)), activation=activation, output=output)


def _module(folder: Path, kind: Any, path: Any) -> Module:
    if not isinstance(kind, str) or not isinstance(path, str):
        _refuse_form(folder / MODULES_FILE)
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts:
        raise ModelError(f"{folder} lists a module in {path!r}", expected="a folder below it")
    if not kind.startswith(_PACKAGE):
        raise ModelError(
            f"{folder} has the module {kind}, whose code is not sentence-transformers' own and is never run here",
            expected=f"modules whose types begin with {_PACKAGE}",
            remedy=f"name another model; or {ALONE}",
        )
    return Module(kind.rpartition(".")[2], "" if path in ("", ".") else place.as_posix())


def _flat(folder: Path, modules: Sequence[Module], side: str) -> tuple[Module, ...]:
    """Put a side's route in the place of each Router."""
    found: list[Module] = []
    for module in modules:
        found += _route(folder, module.path, side) if module.kind in _ROUTERS else [module]
    return tuple(found)


def _route(folder: Path, path: str, side: str) -> list[Module]:
    place = folder / path
    file = _first_of(place, _ROUTER_FILES)
    found = _read(file, "the settings of a Router")
    try:
        types, structure = dict(found["types"]), {key: list(names) for key, names in found["structure"].items()}
        mappings = (found.get("parameters") or {}).get("route_mappings")
    except (AttributeError, KeyError, TypeError, ValueError):
        _refuse_form(file)
    if set(structure) != set(SIDES) or mappings:
        raise ModelError(
            f"{file} has the routes {', '.join(sorted(structure)) or 'none'}"
            + (f" and the route_mappings {mappings}" if mappings else ""),
            expected="one route named query and one named document, and no mappings",
            remedy="save the model anew with these routes: "
            "Router.for_query_document(query_modules=[...], document_modules=[...])",
        )
    return [_module(folder, types.get(name), (PurePosixPath(path) / name).as_posix()) for name in structure[side]]


def _read_pooling(folder: Path, path: str) -> tuple[tuple[str, ...], bool]:
    file = folder / path / "config.json"
    found = _read(file, "the settings of a Pooling")
    if not isinstance(found, dict):
        _refuse_form(file)
    modes = found.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_POOLINGS.items() if found.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    # What is called lasttoken there is one of our poolings, by the name that a recipe has for it.
    return tuple(POOLINGS.get(str(mode), str(mode)) for mode in modes), bool(found.get("include_prompt", True))


def _tokenizer_length(place: Path) -> int | None:
    return _length(_settings(place / "tokenizer_config.json").get("model_max_length"))


def _length(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < _NO_LIMIT else None


def _first_of(place: Path, names: Sequence[str]) -> Path:
    """Return the first file that is there; where there is none, the first."""
    return next((place / name for name in names if (place / name).is_file()), place / names[0])


def _settings(file: Path) -> Mapping[str, Any]:
    """Read settings that a folder may lack."""
    if not file.is_file():
        return {}
    found = _read(file, "the model's settings")
    if not isinstance(found, dict):
        _refuse_form(file)
    return found


def _read(file: Path, what: str) -> Any:
    try:
        return read_json(file, what)
    except ArtifactError as error:
        raise ModelError(error.fact, remedy="copy or download the model again, all its folders included") from error


def _refuse_form(file: Path) -> NoReturn:
    raise ModelError(
        f"{file} has another form than sentence-transformers 2 to 6 write",
        remedy="copy or download the model again, or name another one",
    )
