"""Models by name and by config file: the shapes that they really have."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_adadiag.planner import configs
from sharded_adadiag.planner.configs import decoder_of, model_of_config
from sharded_adadiag.planner.models import DECODERS, Decoder, named_model

# Parameters in all, and in the rotated matrices.
SIZES = {
    "llama-60m": (58_073_600, 25_296_896),
    "llama-130m": (134_105_856, 84_934_656),
    "llama-350m": (367_969_280, 302_383_104),
    "llama-1.3b": (1_339_082_752, 1_207_910_400),
    "llama-7b": (6_738_415_616, 6_476_005_376),
    "llama-70b": (68_976_648_192, 68_451_041_280),
    "mixtral-8x7b": (46_702_792_704, 46_439_333_888),
}
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CONFIGS = [
    {"model_type": "llama", **SMALL},
    {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", **SMALL, "tie_word_embeddings": True, "head_dim": 8},
    {"model_type": "mistral", **SMALL, "num_key_value_heads": 4},
    {"model_type": "qwen2", **SMALL},
    {"model_type": "qwen3", **SMALL, "head_dim": 10},
]


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_named_models_have_the_published_sizes(name):
    weights = named_model(name).weights
    rotated = sum(weight.numel for weight in weights if weight.rotate)
    assert (sum(weight.numel for weight in weights), rotated) == SIZES[name]


def test_neither_embeddings_nor_head_nor_routers_are_rotated():
    weights = named_model("mixtral-8x7b").weights
    plain = {w.name.replace(".0.", ".*.") for w in weights[:40] if not w.rotate}
    assert "model.layers.*.mlp.gate.weight" in plain
    assert "model.embed_tokens.weight" in plain
    assert not weights[-1].rotate and weights[-1].name == "lm_head.weight"
    assert sum(w.rotate for w in weights) == 32 * (4 + 2)


def written(folder: Path, config) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_the_formula_gives_what_transformers_builds(config, tmp_path):
    pytest.importorskip("transformers")
    built = model_of_config(written(tmp_path, config)).weights
    by_formula = decoder_of(config, name="config").weights()
    assert {w.name: w for w in by_formula} == {w.name: w for w in built}


def test_a_folder_with_a_config_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    written(tmp_path, CONFIGS[0])
    model = model_of_config(tmp_path)
    assert model.name == str(tmp_path)
    assert model.weights == Decoder(24, 40, 2, 24, 12, vocab=50).weights()


def test_the_formula_does_without_transformers(tmp_path):
    file = written(tmp_path, {"model_type": "mixtral", **SMALL, "num_local_experts": 3})
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from importlib import util; find = util.find_spec\n"
        "util.find_spec = lambda n, *a: None if n == 'transformers' else find(n, *a)\n"
        "from pathlib import Path\n"
        "from sharded_adadiag.planner.configs import model_of_config\n"
        f"print(sum(w.rotate for w in model_of_config(Path({str(file)!r})).weights))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(2 * (4 + 2))]


def test_stacked_experts_have_a_group_of_their_own(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "mixtral", **SMALL, "num_local_experts": 3}
    model = model_of_config(written(tmp_path, config))
    stacks = [weight for weight in model.weights if len(weight.shape) == 3]
    assert {weight.group for weight in stacks} == {(True, 1)}
    assert len(stacks) == 4 and model.notes == ()
    by_formula = decoder_of(config, name="config").weights()
    assert {w.name: w for w in by_formula} == {w.name: w for w in model.weights}


def test_layers_are_units_and_the_rest_is_one(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2}
    units = {w.unit for w in model_of_config(written(tmp_path, config)).weights}
    assert units == {"", "transformer.h.0", "transformer.h.1"}


@pytest.mark.parametrize(
    "text,word",
    [
        ("no json", "cannot be read"),
        ("[]", "is an object"),
        ('{"model_type": "nix"}', "nix"),
        ("{}", "model"),
    ],
)
@pytest.mark.parametrize("transformers", [True, False])
def test_a_file_that_is_no_config_is_refused_with_its_name(
    text, word, transformers, tmp_path, monkeypatch
):
    if transformers:
        pytest.importorskip("transformers")
    else:
        monkeypatch.setattr(configs.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=word) as error:
        model_of_config(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, "12", True])
def test_a_size_that_is_missing_or_makes_no_sense_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        decoder_of({**CONFIGS[0], key: value}, name="config.json")
