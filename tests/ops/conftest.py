"""Triton's interpreter, made ready once."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Put the interpreter's functions in place of the language's once for each module that holds kernels.

    Triton does so again at each launch and at each call of a function in a kernel, by a search through all names of its
    language, which takes 40 % of the time. Within the tests nothing else reads them.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, ready = interpreter._patch_lang, {}

    def patch_once(fn: Callable[..., Any]) -> Any:
        if fn.__module__ not in ready:
            ready[fn.__module__] = patch(fn)
        return interpreter._LangPatchScope()  # nothing to restore after a launch

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch
    for scope in reversed(ready.values()):
        scope.restore()
