"""Published methods, one folder each: model, losses, recipe, convert, card."""

from pyface.methods._registry import create_model, find_recipe, list_models, load_official, register_model

__all__ = ["create_model", "find_recipe", "list_models", "load_official", "register_model"]
