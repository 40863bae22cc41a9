"""The options in chela/schema.py, the files in configs/model/ and the constructors say the same."""

import dataclasses
import inspect

import pytest
from omegaconf import OmegaConf

from chela.config import configs_folder, names
from chela.layers.mixers import mixer_class
from chela.schema import MIXERS

CONTEXT = {"d_model", "l_max", "causal", "layer", "depth"}
DERIVED = {"d_value"}  # None in a constructor is worked out from d_model; a configuration always says the number


@pytest.mark.parametrize("name", MIXERS)
def test_options_are_the_keyword_arguments(name):
    given = {f.name: f.default for f in dataclasses.fields(MIXERS[name])}
    assert given.pop("name") == name
    parameters = inspect.signature(mixer_class(name)).parameters
    own = {key: p for key, p in parameters.items() if key not in CONTEXT}
    assert all(p.kind is p.KEYWORD_ONLY for p in own.values())
    assert given.keys() == own.keys()
    assert {k: v for k, v in given.items() if k not in DERIVED} == {
        k: p.default for k, p in own.items() if k not in DERIVED
    }


@pytest.mark.parametrize("name", MIXERS)
def test_every_option_says_what_it_means(name):
    for field in dataclasses.fields(MIXERS[name])[1:]:
        assert field.metadata["help"], field.name


def test_an_unknown_system_is_named():
    with pytest.raises(ValueError, match=r"expected one of .*lion.*got 'tiger'"):
        mixer_class("tiger")


@pytest.mark.parametrize("name", names("model"))
def test_files_use_options_that_exist(name):
    """Sizes that come from a task are taken by the systems that have them; a model's own file must hit."""
    content = OmegaConf.to_container(OmegaConf.load(configs_folder() / "model" / f"{name}.yaml"))
    known = {f.name for f in dataclasses.fields(MIXERS[content["model"]["mixer"]["name"]])}
    sections = [content, *content.get("presets", {}).values()]
    for section in sections:
        assert set(section) <= {"model", "presets"}
        assert set(section["model"].get("mixer", {})) <= known


def test_ablations_are_option_sets_of_chela():
    for name in names("model"):
        content = OmegaConf.to_container(OmegaConf.load(configs_folder() / "model" / f"{name}.yaml"))
        if name.startswith("chela"):
            assert content["model"]["mixer"]["name"] == "chela"


def test_the_configs_stay_few():
    files = list(configs_folder().rglob("*.yaml"))
    assert len(files) <= 34
    assert all(len(path.read_text().splitlines()) <= 40 for path in files)
