import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from chela.config import identity
from chela.config.compose import PRESETS, configs_folder, flat, from_saved, load, names, read_group, resolve, to_yaml
from chela.config.identity import fingerprint, identity_of
from chela.config.schema import fields, seconds
from chela.core.errors import UsageError
from chela.layers.mixers import mixer_options, systems
from lra.tasks import task_class, task_options

ROOT = Path(__file__).parents[1]
FIXED = [preset for preset in PRESETS if preset != "auto"]


def test_every_option_has_a_meaning_and_a_default_within_its_bounds() -> None:
    for name in names("model"):
        config = resolve([f"model={name}", "preset=mini"])
        for key, _, field in fields(config):
            if not key.endswith(".name"):
                assert field.metadata.get("help"), key


@pytest.mark.parametrize(
    ("task", "model", "preset"),
    [(task, "chela", preset) for task in names("task") for preset in FIXED]
    + [("listops", model, "mini") for model in names("model")],
)
def test_round_trip(task: str, model: str, preset: str, tmp_path: Path) -> None:
    config = resolve([f"task={task}", f"model={model}", f"preset={preset}", "seed=7", "trainer.max_time=1h30m"])
    assert config.model.name == model and model.startswith(config.model.mixer.name)  # a variant keeps its system
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load(tmp_path / "config.yaml")
    assert again == config and fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize(
    "text", ["1e3", "true", "on", "0x10", "2020-01-01", "~", "a: b", "- a", "#", "'", '"', "1_000"]
)
def test_text_stays_text(text: str, tmp_path: Path) -> None:
    config = resolve([f"runs={text}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml").runs == text == config.runs


def test_later_layers_win() -> None:
    assert resolve(["preset=tiny"]).trainer.max_steps == 20
    assert resolve(["preset=tiny", "trainer.max_steps=30"]).trainer.max_steps == 30
    assert resolve(["trainer.max_steps=30", "preset=tiny", "trainer.max_steps=31"]).trainer.max_steps == 31
    assert resolve(["model=linear", "preset=mini"]).model.positions == "learned"
    assert resolve(["model=softmax", "preset=tiny"]).model.d_model == 16


def test_no_configuration_changes_the_next_one(tmp_path: Path) -> None:
    """Defaults and shipped files are read once; a file of one's own is read each time."""
    before = resolve(["task=pathfinder", "preset=tiny"])
    other = resolve(
        ["task=pathfinder", "preset=tiny", "model.depth=7", "task.contour_lengths=[2,3]", "optimizer.lr=0.5"]
    )
    other.task.contour_lengths.append(4)
    other.model.mixer.heads = 0
    assert resolve(["task=pathfinder", "preset=tiny"]) == before
    for depth in (3, 4):
        (tmp_path / "mine.yaml").write_text(f"model: {{mixer: {{name: linear}}, depth: {depth}}}")
        assert resolve([f"model={tmp_path / 'mine.yaml'}", "preset=mini"]).model.depth == depth


def test_a_preset_may_size_one_mixer_apart() -> None:
    """CHELA's values are narrower at mini, whatever the row that has it, unless it is sized too; a word still wins."""

    def d_value(*words: str) -> int:
        return resolve(["task=listops", *words]).model.mixer.d_value

    assert d_value("model=chela", "preset=mini") == d_value("model=chela_long_only", "preset=mini") == 64
    assert d_value("model=chela_conv_only", "preset=mini") == 92  # a row of its own: of CHELA's size
    assert d_value("model=softmax", "preset=mini") == d_value("preset=mini", "model.mixer.d_value=152") == 152
    assert d_value("model=chela", "preset=full") == d_value("model=softmax", "preset=full")


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in ("preset", "task") for name in names(group)])
def test_the_sizes_of_systems_in_a_file_are_options_of_them(group: str, name: str) -> None:
    """Those of all systems together: each takes those that it has."""
    options = {mixer: {field.name for field in dataclasses.fields(mixer_options(mixer))} for mixer in systems()}
    layers = read_group(group, name)
    for said in (section for layer in layers for section in (layer, *layer.get("presets", {}).values())):
        assert said.get("model", {}).get("mixer", {}).keys() <= set().union(*options.values())
        for mixer, sizes in said.get("mixers", {}).items():
            assert sizes.keys() <= options[mixer]
        assert said.get("models", {}).keys() <= {*names("model")}
        for key in flat(said.get("models", {})):
            assert ".mixer." not in key or key.rpartition(".")[2] in set().union(*options.values()), key


def test_a_task_and_a_system_that_are_not_asked_for_are_not_loaded() -> None:
    code = (
        "import sys; from chela.config.compose import resolve; resolve(['task=listops', 'model=softmax'])\n"
        "loaded = {name for name in sys.modules if name.startswith(('lra.tasks.', 'chela.layers.mixers.'))}\n"
        "print(*sorted(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [
        "chela.layers.mixers.softmax",
        "lra.tasks.base",
        "lra.tasks.listops",
        "lra.tasks.stored",
    ]


def test_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve([]).preset == "mini"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve([]).preset == "full"
    assert resolve(["trainer.accelerator=cpu"]).preset == "mini"
    assert resolve(["preset=tiny"]).preset == "tiny"


def test_what_changes_the_fingerprint() -> None:
    plain = fingerprint(resolve(["preset=tiny"]))
    none = ["runs=x", "resume=auto", "data.dir=x", "trainer.max_time=9m", "trainer.progress=none", "preset=tiny"]
    for word in (*none, "trainer.log_every=3", "trust=x", "wandb=true"):
        assert fingerprint(resolve(["preset=tiny", word])) == plain, word
    for word in ("seed=1", "model.depth=3", "task.seed=1", "optimizer.lr=1e-4", "trainer.max_steps=21", "model=linear"):
        assert fingerprint(resolve(["preset=tiny", word])) != plain, word


@pytest.mark.parametrize(
    ("task", "other"), [("listops", True), ("pathx", True), ("image", False), ("retrieval", False)]
)
def test_a_release_in_place_of_generated_data_changes_the_fingerprint(task: str, other: bool) -> None:
    """And where it lies does not."""
    words = ([], ["data.root=a"], ["data.root=b"])
    plain, mine, moved = (fingerprint(resolve(["preset=tiny", f"task={task}", *more])) for more in words)
    assert (mine != plain) is other and moved == mine


def test_another_version_of_a_task_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(["preset=tiny"])
    plain = fingerprint(config)
    monkeypatch.setattr(task_class("listops"), "version", "1.0.1")
    assert fingerprint(config) != plain
    monkeypatch.undo()
    assert fingerprint(config) == plain


def test_a_newer_option_leaves_older_fingerprints() -> None:
    """By rule: at its neutral value it is not counted, for every option that declares one."""
    config = resolve(["preset=tiny"])
    newer = {key: field.metadata["neutral"] for key, _, field in fields(config) if "neutral" in field.metadata}
    assert newer["trainer.accumulate"] == 1
    options = {key: value for key, value, _ in fields(config)}
    assert not identity_of(options | newer).keys() & newer.keys()
    assert fingerprint(resolve(["preset=tiny", "trainer.accumulate=2"])) != fingerprint(config)


def test_every_committed_run_is_read_with_its_fingerprint() -> None:
    equal = []
    for path in (ROOT / "experiments" / "results").rglob("runs.jsonl"):
        ended = [run for run in map(json.loads, path.read_text().splitlines()) if "result" in run]
        equal += [fingerprint(from_saved(run["config"], path)) == run["result"]["fingerprint"] for run in ended]
    assert len(equal) > 350 and all(equal)


SAVED = {"task.name": "listops", "model.mixer.name": "chela", "model.mixer.d_value": 64, "trainer.old": 3}


def test_a_retired_option_is_read_at_one_value_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = resolve(["preset=tiny"])
    before = fingerprint(config)
    rows = {("chela", "model.mixer.reparam"): {"value": True}, ("", "trainer.old"): {"neutral": 3}}
    monkeypatch.setattr(identity, "RETIRED", {**identity.RETIRED, **rows})
    assert identity.of_today(SAVED, {}) == {key: SAVED[key] for key in SAVED if key != "trainer.old"}
    with pytest.raises(ValueError, match=r"trainer\.old: expected 3, the one value that is still read, got 4$"):
        identity.of_today({**SAVED, "trainer.old": 4}, {})
    options = {key: value for key, value, _ in fields(config)}
    gone = {key: value for key, value in options.items() if key != "model.mixer.reparam"}
    assert identity_of(gone | {"trainer.old": 3}) == identity_of(options)
    assert fingerprint(config) == before


def test_what_a_run_of_before_lacks(tmp_path: Path) -> None:
    """A newer option that a run lacks has the neutral value, whatever its default is."""
    nested = dataclasses.asdict(resolve(["preset=tiny"]))
    del nested["model"]["mixer"]["pooled"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(nested)))
    assert load(tmp_path / "config.yaml").model.mixer.pooled == 0.25


@pytest.mark.parametrize(
    ("group", "text", "message"),
    [
        ("model", "model: {mixer: {name: linear, head: 4}}", "unknown key 'model.mixer.head' (did"),
        ("model", "model: {mixer: {name: linear}, dept: 4}", "unknown key 'model.dept' (did you mean"),
        ("model", "model: {depth: 4}", "model: {mixer: {name: …}} in that of model="),
        ("model", "model: {mixer: 3}", "model: {mixer: {name: …}} in that of model="),
        ("model", "model: {mixer: {name: 'absent_module:X'}}", "expected a module absent_module in this folder"),
        ("model", "[1]", "expected sections such as model"),
        ("model", "a: [", "expected YAML, could not read it"),
        ("task", "task: {name: listops, trian: 5}", "'task.trian' (did you mean 'task.train'?)"),
        ("task", "task: {name: lstops}", "expected one of"),
        ("task", "task: {name: listops}\npresets: {mini: {model: {mixer: {d_valeu: 4}}}}", "did you mean"),
        ("task", "task: {name: listops}\npresets: {mini: {mixers: 3}}", "expected task: {name: …} and sections"),
        ("task", "task: {name: listops}\npresets: {mini: {models: {chela: 3}}}", "sections such as trainer"),
    ],
)
def test_a_file_with_a_mistake_is_told_so(group: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        resolve([f"{group}={path}", "preset=mini"])
    assert message in str(error.value)


@pytest.mark.parametrize("word", ["true", "false", "yes", "no", "on", "off", "y", "n", "1", "0"])
def test_what_is_true_and_what_is_false(word: str) -> None:
    expected = word in ("true", "yes", "on", "y", "1")
    for spelled in (word, word.upper()):
        assert resolve(["preset=tiny", f"model.prenorm={spelled}"]).model.prenorm is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("30s", 30), ("9m", 540), ("1h30m", 5400), ("2d", 172800), ("1.5h", 5400), ("0s", 0)],
)
def test_durations(text: str, expected: float | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["9", "m", "9 m", "9x", "-1m", "00:09:00", "9m!", "s9"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match=r"trainer.max_time: expected a time such as 30s, 9m"):
        seconds(text)


def test_the_files_of_the_groups_are_few_and_short() -> None:
    assert len(list(configs_folder().rglob("*.yaml"))) <= 28
    for path in sorted(configs_folder().rglob("*.yaml")):
        assert len(path.read_text().splitlines()) <= 50, path


def test_the_full_preset_is_the_task_to_the_letter() -> None:
    for task in names("task"):
        config = resolve([f"task={task}", "preset=full"]).task
        default = task_options(task)()
        if hasattr(default, "normalization"):  # of the pixels: that of the recipe in the task's file
            default.normalization = config.normalization
        assert config == default
