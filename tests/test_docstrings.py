"""The examples in public docstrings run, and public names are documented in the Google form."""

import doctest
import importlib
import inspect

import pytest
import torch

import dropit

MODULES = ["budget", "convert", "coverage", "memory", "lightning", "layers.table", "layers.layer"]
FUNCTIONS = [name for name in dropit.__all__ if inspect.isfunction(getattr(dropit, name))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    module = importlib.import_module(f"dropit.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_most_public_names_have_an_example():
    assert sum(">>>" in (inspect.getdoc(getattr(dropit, name)) or "") for name in dropit.__all__) >= 6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_say_what_they_take_and_return(name):
    function = getattr(dropit, name)
    text = inspect.getdoc(function)
    assert "Args:" in text
    assert "Returns:" in text
    documented = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in documented or f"{parameter}," in documented, parameter
