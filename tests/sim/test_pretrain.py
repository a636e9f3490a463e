import jax
import numpy as np
import pytest

from fedjax_lora.data import sources
from fedjax_lora.models import vit
from fedjax_lora.tasks.classification import cross_entropy
from fedjax_lora.training import pretrain
from fedjax_lora.training.pretrain import PretrainConfig, pretrained
from oracles.model_context import model_context


@pytest.fixture
def setting(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path / "cache"))
    public = sources.load(sources.DataConfig()).public
    assert public is not None and set(np.unique(public["label"])) == {0, 1, 2, 3, 4}
    made = model_context(10).made
    model = vit.vit(vit.VitConfig(hidden=16, num_layers=2, mlp_width=24), made["task"], made["adapter"])
    return model, made["task"], public


def assert_equal(result, other):
    jax.tree.map(np.testing.assert_array_equal, result, other)


def test_weights_are_trained_once_and_read_back_bit_for_bit(setting, monkeypatch):
    model, task, public = setting
    config = PretrainConfig(steps=2, batch_size=8)
    first = pretrained(model, task, public, config, "a")

    def refuse(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(pretrain, "pretrain", refuse)
    assert_equal(pretrained(model, task, public, config, "a"), first)
    with pytest.raises(AssertionError, match="trained again"):
        pretrained(model, task, public, config, "other data")


def flip(content):
    """One bit of the last weight: still a file of the format."""
    return content[:-1] + bytes([content[-1] ^ 1])


def unsigned(content):
    """As a file without a digest would be."""
    return content.replace(b'"sha256"', b'"sha255"')


@pytest.mark.parametrize("damage", [lambda content: content[:100], flip, unsigned], ids=["cut", "flip", "unsigned"])
def test_a_damaged_file_is_trained_anew_and_replaced(setting, tmp_path, damage):
    """Invariance: the weights and the file are those of before."""
    model, task, public = setting
    config = PretrainConfig(steps=2, batch_size=8)
    first = pretrained(model, task, public, config, "a")
    (path,) = (tmp_path / "cache").iterdir()
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    assert_equal(pretrained(model, task, public, config, "a"), first)
    assert path.read_bytes() == before


def test_a_cache_that_cannot_be_written_costs_a_warning(setting, tmp_path, monkeypatch):
    model, task, public = setting
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached"):
        pretrained(model, task, public, PretrainConfig(steps=1, batch_size=8), "a")


def test_training_lowers_the_loss_on_the_public_part_below_chance(setting):
    """Oracle: five classes guessed at random cost log 5."""
    model, task, public = setting
    base, head = pretrained(model, task, public, PretrainConfig(steps=150, batch_size=32, learning_rate=3e-3), "a")
    from fedjax_lora.core.types import Adapters

    logits = model.apply(base, Adapters(modules={}, head=head), public)
    assert cross_entropy(logits, public["label"], np.ones(len(public["label"]))) < 0.5 * np.log(5)
