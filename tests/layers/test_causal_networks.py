"""No network of a causal configuration hears a later token, in training either."""

import pytest
import torch

from chela.config.compose import names, resolve
from chela.core.errors import UsageError
from chela.models import build_model
from lra.tasks import get_task


# The norm stands beside the mixer, which does not know of it: each system with one of them, one system with each.
@pytest.mark.parametrize(
    ("model", "norm"), [*((model, "layer") for model in names("model")), ("chela", "rms"), ("chela", "scale")]
)
def test_a_changed_token_changes_no_output_before_it(model, norm):
    config = resolve(["task=recall", "preset=tiny", f"model={model}", f"model.norm={norm}"])
    network = build_model(config.model, get_task(config.task), seed=0).double().train()
    tokens = torch.randint(1, 16, (4, 16))
    changed = tokens.clone()
    changed[:, 9] = tokens[:, 9] % 15 + 1
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-10)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_batch_norm_is_refused():
    config = resolve(["task=recall", "preset=tiny", "model.norm=batch"])
    resolve(["task=image", "preset=mini", "model=lightning"])  # one label for a whole sequence: nothing to tell
    with pytest.raises(UsageError, match="its statistics tell of later tokens"):
        build_model(config.model, get_task(config.task), seed=0)
