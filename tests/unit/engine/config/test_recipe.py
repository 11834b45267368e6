"""The configuration: merging, naming of mistakes, comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.file import differences, dump_config, load_config, parse_config
from engine.config.recipe import Config
from engine.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
SMALLEST = {"run": {"path": "r"}, "retriever": {"name": "g"}, "ranker": {"name": "d"}}


def test_words_of_the_command_line_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run: {path: r, seed: 1}\nretriever: {name: g}\nranker: {name: d}\n")
    config = load_config(file, ["run.seed=7", "ar2.ranker.optim.lr=1e-6", "data.path=/x=y", "retriever.tied=false"])
    assert (config.run.seed, config.ar2.ranker.optim.lr, config.data.path) == (7, 1e-6, Path("/x=y"))
    assert config.retriever.tied is False


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'ar2.num_negative', did you mean 'ar2.num_negatives'"):
        parse_config(SMALLEST | {"ar2": {"num_negative": 3}}, "c")
    with pytest.raises(ConfigError, match=r"did you mean 'ranker\.max_length'"):  # in a section that can be left out
        parse_config(SMALLEST | {"ranker": {"name": "d", "max_lenght": 3}}, "c")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("warmup_retriever.lr=1", ", did you mean 'warmup_retriever.optim.lr'?"),
        ("ar2.lr=1", ", did you mean 'ar2.ranker.optim.lr' or 'ar2.retriever.optim.lr'?"),
        ("retriever.lr=1", ", did you mean 'ar2.retriever.optim.lr' or 'warmup_retriever.optim.lr'?"),
        ("ranker.optim.lr=1", ", did you mean 'ar2.ranker.optim' or 'warmup_ranker.optim'?"),
        ("warmup_retriever.batch=4", ", did you mean 'warmup_retriever.batch_size'?"),
        ("warmup_retriever.otpim.lr=1", ", did you mean 'warmup_retriever.optim'?"),
        ("ar2.seed=1", ", did you mean 'run.seed'?"),
        ("retriver.name=x", ", did you mean 'retriever'?"),
        ("evaluation.foo=1", ": evaluation has metrics, relevance_threshold, depth, "),
        ("data.foo=1", "(`sparring options data` lists them)"),
        ("foo=1", ": the sections are recipe, run, data, "),
        ("ar2.negatives.sampler.a=1", ": ar2.negatives.sampler has name, top_k (`"),
        ("ar2.negatives.filters=[{name: margin, shar: 1}]", ", did you mean 'ar2.negatives.filters.0.share'?"),
    ],
)
def test_a_key_that_is_nearly_right_is_told_whole(word: str, meant: str) -> None:
    """Symptom: of `warmup_retriever.lr` the nearest was said to be `warmup_retriever`, which is right already."""
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "tiny.yaml", [word])
    assert meant in str(caught.value)
    assert "1 problem: unknown key" in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    broken = SMALLEST | {"ranker": {"max_length": "long"}, "index": {"placement": "cloud"}}
    with pytest.raises(ConfigError) as caught:
        parse_config(broken, "c")
    for part in ("3 problems", "ranker.max_length", "'long'", "'ranker.name' is not given", "index.placement"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("ar2", {"num_negatives": 15, "top_k": 10}, "must be at most ar2.top_k"),
        ("ar2", {"adversarial_weight": 0, "distillation_weight": 0}, "would learn nothing"),
        ("ar2", {"num_negatives": 1, "distillation_weight": 0}, "gradient of Eq. 9 as printed is 0"),
        ("ar2", {"distillation_weight": 0, "teacher": "always", "adversarial_from": "lead"}, "learns from Eq. 9 alone"),
        ("warmup_retriever", {"hard_negatives": 5, "bm25_depth": 4}, "at most warmup_retriever.bm25_depth"),
        (
            "warmup_retriever",
            {"batch_size": 1, "hard_negatives": 0},
            "each positive would stand alone and the model would learn nothing: raise the batch_size, or hard_neg",
        ),
        ("evaluation", {"depth": 10, "rerank_depth": 20, "metrics": ["R@5"]}, "deeper than evaluation.depth"),
        (
            "evaluation",
            {"metrics": ["R@5", "bpref@10"]},
            r"'bpref@10' is no metric: there are R@k, MRR@k, nDCG@k, MAP@k, A@k",
        ),
        ("evaluation", {"metrics": ["R@0"]}, "'R@0' is no metric"),
        ("evaluation", {"metrics": ["R@5", "R@5"]}, "R@5 stands there more than once"),
        ("evaluation", {"metrics": []}, "evaluation.metrics"),
        ("run", {"path": "r", "keep_best": "R@3"}, "run.keep_best 'R@3' is none of evaluation.metrics"),
        (
            "ar2",
            {"reference_batch_size": 16},
            "reference_batch_size is 16, but adversarial_reduction mean adds nothing up",
        ),
        ("data", {"fallback_depth": 50}, "fallback_depth is 50, but fallback_positive none looks for no passage"),
        ("ar2", {"irgan_support": "negatives"}, "the objective ar2 has no generator of IRGAN's"),
        ("ar2", {"objective": "irgan", "in_batch_negatives": "world"}, "set objective to ance, or leave it out"),
        ("ar2", {"in_batch_negatives": "world"}, r"set objective to ance, give contrastive_weight a value"),
        ("ar2", {"contrastive_weight": 0.2}, "set in_batch_negatives to world, or leave the weight out"),
        ("ar2", {"objective": "irgan", "contrastive_weight": 0.2}, "irgan has no Eq. 9 and 12"),
        ("ar2", {"objective": "ance", "contrastive_weight": 0.2}, "ance has no Eq. 9 and 12"),
        (
            "ar2",
            {"objective": "irgan", "irgan_support": "negatives", "num_negatives": 1},
            "the generator has one document to draw from",
        ),
        ("ar2", {"ranker_restarts": "pretrained", "ranker": {"steps": 0}}, "an untrained ranker would be the opponent"),
        ("retriever", {"name": "g", "max_length": 16}, "exceeds retriever.max_length"),
        ("retriever", {"name": "g", "layers": [0, 5], "num_layers": 2}, "num_layers and layers both say"),
        ("ranker", {"name": "d", "layers": [3, 0]}, r"layers is \[3, 0\], expected numbers from 0 on, ascending"),
        ("ranker", {"name": "d", "layers": [-1, 2]}, r"layers is \[-1, 2\], expected numbers from 0 on, ascending"),
        ("index", {"embeddings": "local"}, "index.local_folder names no folder on the hosts' own disks"),
        ("index", {"local_folder": "/scratch"}, "but index.embeddings is shared: set index.embeddings=local"),
        ("index", {"embeddings": "local", "local_folder": "scratch"}, "it must be absolute"),
        (
            "warmup_retriever",
            {"optim": {"head_lr_scale": 10}},
            "warmup_retriever.optim.head_lr_scale is 10, but warmup_retriever trains the retriever, which is no ranker",
        ),
    ],
)
def test_values_that_contradict_each_other(section: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(SMALLEST | {section: values}, "c")


def test_what_reads_any_embedding_at_any_time_is_refused_where_hosts_have_only_their_own() -> None:
    local = SMALLEST | {"index": {"embeddings": "local", "local_folder": "$TMPDIR/x"}}
    assert parse_config(local, "c").index.local_folder == "$TMPDIR/x", "which each host reads for itself"
    for section, values in (("ranker", {"name": "d", "prior": 1.0}), ("evaluation", {"fuse": True})):
        with pytest.raises(ConfigError, match=r"index\.embeddings is local, but .*set .*(prior=0|fuse=false)"):
            parse_config(local | {section: values}, "c")


def test_another_folder_on_the_hosts_is_no_other_recipe() -> None:
    local = {"embeddings": "local", "local_folder": "/a"}
    first = parse_config(SMALLEST | {"index": local}, "c")
    moved = parse_config(SMALLEST | {"index": local | {"local_folder": "/b", "gather_embeddings": False}}, "c")
    assert differences(moved, first) == []
    assert differences(parse_config(SMALLEST, "c"), first) == ["index.embeddings: local -> shared"]


def test_a_recipe_without_a_ranker_has_none_whether_or_not_it_is_named(tmp_path: Path) -> None:
    """One word turns a recipe into ANCE; and a ranker that is missing from a game is told with both ways out."""
    alone = {name: SMALLEST[name] for name in ("run", "retriever")}
    for tree in (SMALLEST, alone):
        config = parse_config(tree | {"ar2": {"objective": "ance"}}, "c")
        assert list(config.models) == ["retriever"]
        assert {phase.model for phase in config.timetable.phases} == {"retriever"}
        (tmp_path / "c.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "c.yaml") == config
    for objective in ("ar2", "irgan"):
        assert list(parse_config(SMALLEST | {"ar2": {"objective": objective}}, "c").models) == ["retriever", "ranker"]
        with pytest.raises(ConfigError, match=r"'ranker\.name' is not given.*or set ar2.objective to ance"):
            parse_config(alone | {"ar2": {"objective": objective}}, "c")


def test_what_teaches_nothing_in_one_game_may_stand_in_another() -> None:
    silent = {"adversarial_weight": 0, "distillation_weight": 0}
    for objective in ("irgan", "ance"):
        assert parse_config(SMALLEST | {"ar2": silent | {"objective": objective}}, "c").ar2.objective == objective


def test_what_is_given_and_read_by_nothing_is_known() -> None:
    """Symptom: `adversarial_from: lead` with weight 0, `fusion_candidates` without a mixture: nothing, in silence."""
    assert parse_config(SMALLEST, "c").unread == {}
    for tree, unread in (
        ({"evaluation": {"fusion_candidates": "retriever"}}, {"evaluation.fuse is false": ("fusion_candidates",)}),
        ({"evaluation": {"fusion_candidates": "retriever", "fuse": True}}, {}),
        ({"ar2": {"teacher": "always", "adversarial_from": "lead"}}, {}),
        (
            {"ar2": {"adversarial_weight": 0, "adversarial_from": "lead", "adversarial": "released"}},
            {"ar2.adversarial_weight is 0": ("adversarial", "adversarial_from")},
        ),
        ({"ar2": {"adversarial_weight": 0, "teacher": "dev"}}, {}),
        (
            {"ar2": {"objective": "irgan", "teacher": "always", "distillation_weight": 0}},
            {"ar2.objective is irgan": ("distillation_weight", "teacher")},
        ),
        (
            {"ar2": {"objective": "ance", "ranker_restarts": "warmup"}},
            {"ar2.objective is ance": ("ranker_restarts",)},
        ),
    ):
        found = parse_config(SMALLEST | tree, "c").unread
        assert {why: tuple(name.split(".")[1] for name in names) for why, names in found.items()} == unread


def test_a_weight_of_nothing_asks_nothing_of_dev() -> None:
    """Symptom: data without dev queries were refused for when Eq. 9 would begin to count, though it had no weight."""
    game = {"adversarial_from": "lead"}
    assert parse_config(SMALLEST | {"ar2": game}, "c").ar2.decided_on_dev == ["ar2.adversarial_from=lead"]
    assert parse_config(SMALLEST | {"ar2": game | {"adversarial_weight": 0}}, "c").ar2.decided_on_dev == []


def test_a_missing_file_and_a_word_without_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("run: {path: r}\n")
    with pytest.raises(ConfigError, match="'seed' is no override"):
        load_config(file, ["seed"])
    file.write_text("run: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(file)


@pytest.mark.parametrize(
    ("teacher", "left"),
    [("always", r"teach the retriever nothing\."), ("lead", "nothing but how much its labels"), ("dev", "its labels")],
)
def test_one_negative_without_r_is_refused_in_words_that_are_true_of_each_teacher(teacher: str, left: str) -> None:
    """Symptom: the retriever "would learn nothing", though all but `always` leave it the label's part of its groups."""
    game = {"num_negatives": 1, "distillation_weight": 0, "teacher": teacher}
    with pytest.raises(ConfigError, match=left):
        parse_config(SMALLEST | {"ar2": game}, "c")
    for more in ({"num_negatives": 2}, {"distillation_weight": 0.1}, {"adversarial": "released"}):
        assert parse_config(SMALLEST | {"ar2": game | more}, "c").ar2.teacher == teacher


def test_a_random_model_whose_heads_do_not_fit_is_refused_before_any_work() -> None:
    """Symptom: data were read and written before "hidden_size 32 is no multiple of num_heads 3." with no way out."""
    with pytest.raises(ConfigError, match=r"random_model: hidden_size 32 is no multiple of num_heads 3, .*to 33, or"):
        load_config(CONFIGS / "tiny.yaml", ["random_model.num_heads=3"])
    assert load_config(CONFIGS / "tiny.yaml", ["random_model.num_heads=3", "random_model.hidden_size=33"])


def test_values_of_a_section_that_contradict_each_other_are_told_without_the_whole_section() -> None:
    """Symptom: each such message ended in the section, cut off in its midst: `got {'order': ... 'retrie...`."""
    for section, values in (
        ("ar2", {"irgan_support": "negatives", "order": "paper"}),
        ("retriever", {"name": "g", "layers": [0, 5], "num_layers": 2}),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(SMALLEST | {section: values}, "c")
        assert "{" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: .*, got \[R@5, R@5\]"):
        parse_config(SMALLEST | {"evaluation": {"metrics": ["R@5", "R@5"]}}, "c")


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["data.path=/tmp/x"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_differences_leave_out_what_changes_no_result_but_not_the_seed() -> None:
    config = parse_config(SMALLEST, "c")
    moved = parse_config(SMALLEST | {"run": {"path": "elsewhere", "log_every_steps": 1}}, "c")
    reseeded = parse_config(SMALLEST | {"run": {"path": "r", "seed": 3}}, "c")
    assert differences(moved, config) == []
    assert differences(reseeded, config) == ["run.seed: 42 -> 3"]


def test_what_decides_between_iterations_is_no_other_place_to_save() -> None:
    """Symptom: a run that was resumed with another `run.keep_best` weighed its teacher by another metric."""
    config = parse_config(SMALLEST, "c")
    by_rank, by_recall = (
        parse_config(SMALLEST | {"run": {"path": "r", "keep_best": name}}, "c") for name in ("MRR@10", "R@1")
    )
    assert differences(by_rank, config) == [], "as iterations are compared unless it is said"
    assert differences(by_recall, config) == ["run.keep_best: None -> R@1"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_the_index_may_be_named_alone(tmp_path: Path) -> None:
    """`index: auto` is how a recipe is written by hand; single settings still go below it."""
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {path: runs/x}\nretriever: {name: a}\nranker: {name: b}\nindex: Flat\n")
    assert load_config(path).index.factory == "Flat"
    assert load_config(path, ["index=auto"]).index.factory == "auto"
    index = load_config(path, ["index.memory_gib=4"]).index
    assert (index.factory, index.memory_gib) == ("Flat", 4.0)
