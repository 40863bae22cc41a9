"""Constructors declare their options, configs/model/ uses them, and any class of the user's can be a mixer."""

import inspect
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from chela.core.errors import UsageError
from chela.layers.mixers import build_mixer, mixer_class, systems

CONTEXT = {"d_model", "l_max", "causal", "layer", "depth", "dropout"}
SYSTEMS = ["chela", "hedgehog", "lightning", "linear", "lion", "mega", "s4d", "softmax"]


def options(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(mixer_class(name)).parameters
    return {key: parameter for key, parameter in parameters.items() if key not in CONTEXT}


def test_every_file_is_a_system():
    assert systems() == SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_options_are_keyword_arguments_with_a_type_and_a_meaning(name):
    cls = mixer_class(name)
    hints = get_type_hints(inspect.unwrap(cls.__init__), include_extras=True)
    for key, parameter in options(name).items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert any(f"\n    {key}: " in inspect.cleandoc(base.__doc__ or "") for base in cls.__mro__)
        hint = hints[key]
        if get_origin(hint) is Annotated:
            hint, limits = get_args(hint)[:2]
            assert limits.keys() <= {"ge", "gt", "le", "lt", "neutral"}
        if get_origin(hint) is Literal:
            assert parameter.default in get_args(hint)
        else:
            assert hint in (int, float, bool, str, int | None)
            assert type(parameter.default) in (hint, *get_args(hint))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_constructor_holds_its_options_to_their_limits(name):
    hints = get_type_hints(inspect.unwrap(mixer_class(name).__init__), include_extras=True)
    bounded = [key for key in options(name) if "ge" in getattr(hints[key], "__metadata__", ({},))[0]]
    assert bounded
    for key in bounded:
        with pytest.raises(ValueError, match=rf"^{key}: expected (at least|more than) [\d.]+, got -1$"):
            build_mixer(name, 16, {key: -1}, l_max=8)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tigre", r"expected one of chela, .*, or module:Class, got 'tigre'$"),
        ("lionn", r"got 'lionn' \(did you mean 'lion'\?\)"),
        ("no_such_module:Mixer", "expected a module no_such_module in this folder"),
        ("no_such.module:Mixer", "expected a module no_such.module in this folder"),
        (":Mixer", "expected a module in this folder"),
        ("json:Mixer", "expected a subclass of Module, 'json:Mixer' is None"),
        ("json:JSONDecoder", "expected a subclass of Module, .* is <class"),
    ],
)
def test_an_unknown_system_is_named(name, match):
    with pytest.raises(UsageError, match=match) as caught:
        mixer_class(name)
    assert "\n" not in str(caught.value)


def test_a_class_of_ones_own_gets_what_its_constructor_names():
    assert isinstance(build_mixer("torch.nn:Linear", 4, {"out_features": 3}, l_max=8, causal=True), torch.nn.Linear)
    assert build_mixer("chela.layers.mixers.s4d:S4D", 4, {}, l_max=8, causal=True, layer=0, depth=2).causal
