"""A method as small as one can be, for tests of the engine and of the commands that serve every method."""

from pyface.methods import register_model
from toy_method.recipe import Regression


def create(pretrained: bool = False, **config):
    return Regression(Regression.Config.preset(**config)).model()


register_model("toy_method", create, lambda checkpoint: create())
