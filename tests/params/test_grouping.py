"""Which parameters are rotated, for the model families people train."""

from __future__ import annotations

import logging

import pytest
import torch
from support.families import (
    LLAMA_MATRICES,
    BlockMLP,
    ListMLP,
    ResNet,
    ViT,
    gpt2,
    hf_vit,
    llama,
    named,
    split,
)
from torch import nn

from sharded_adadiag.params.grouping import param_groups

# --- language models --------------------------------------------------------------


def test_llama_rotates_seven_matrices_per_layer() -> None:
    model = llama()
    rotated, plain = split(model)
    assert rotated == LLAMA_MATRICES
    assert "model.embed_tokens.weight" in plain
    assert "lm_head.weight" in plain
    assert plain == [name for name in named(model) if name not in rotated]


def test_llama_with_a_tied_head_has_the_embedding_once() -> None:
    rotated, plain = split(llama(tied=True))
    assert rotated == LLAMA_MATRICES
    assert "model.embed_tokens.weight" in plain
    assert "lm_head.weight" not in plain


def test_llama_without_a_head_rotates_its_last_linear() -> None:
    rotated, plain = split(llama().model)
    assert rotated == [name.removeprefix("model.") for name in LLAMA_MATRICES]
    assert "embed_tokens.weight" in plain


def test_a_declared_head_is_found_inside_a_wrapping_module() -> None:
    model = nn.ModuleDict({"policy": llama(), "value": nn.Linear(16, 4)})
    rotated, plain = split(model)
    assert "policy.lm_head.weight" in plain
    assert "value.weight" in rotated


def test_gpt2_rotates_its_conv1d_layers() -> None:
    rotated, plain = split(gpt2())
    assert rotated == [
        f"transformer.h.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert "transformer.wte.weight" in plain  # tied to the head
    assert "transformer.wpe.weight" in plain


def test_a_linear_tied_to_an_embedding_is_an_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unembed = nn.Linear(8, 20, bias=False)  # registered first
            self.hidden = nn.Linear(8, 8)
            self.embed = nn.Embedding(20, 8)
            self.embed.weight = self.unembed.weight
            self.readout = nn.Linear(8, 4)

    rotated, plain = split(Tied())
    assert rotated == ["hidden.weight"]
    assert plain == ["unembed.weight", "hidden.bias", "readout.weight", "readout.bias"]


# --- vision models ----------------------------------------------------------------


def test_resnet_rotates_every_convolution_and_not_the_head() -> None:
    model = ResNet()
    rotated, plain = split(model)
    assert rotated == [n for n, p in model.named_parameters() if p.dim() == 4]
    assert rotated[0] == "conv1.weight"
    assert {"fc.weight", "fc.bias", "bn1.weight"} <= set(plain)


def test_vit_rotates_fused_attention_and_the_patch_projection() -> None:
    rotated, plain = split(ViT())
    blocks = [f"encoder.layers.{i}." for i in range(2)]
    weights = (
        "self_attention.in_proj_weight",
        "self_attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    )
    assert rotated == ["conv_proj.weight"] + [b + w for b in blocks for w in weights]
    assert {"class_token", "encoder.pos_embedding", "heads.head.weight"} <= set(plain)


def test_vit_without_a_head_has_none() -> None:
    rotated, _ = split(ViT(head=False))
    assert "encoder.layers.1.mlp.2.weight" in rotated


def test_hugging_face_vit() -> None:
    model = hf_vit()
    rotated, plain = split(model)
    assert {"classifier.weight", "classifier.bias"} <= set(plain)
    tokens = [
        n for n in named(model) if n.endswith(("cls_token", "position_embeddings"))
    ]
    assert len(tokens) == 2
    assert set(tokens) <= set(plain)
    others = [n for n, p in model.named_parameters() if p.dim() > 1 and n not in tokens]
    assert rotated == [n for n in others if n != "classifier.weight"]


# --- plain networks ---------------------------------------------------------------


def test_the_last_linear_of_an_mlp_is_its_head() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    assert split(model)[0] == ["0.weight", "2.weight"]


def test_the_last_linear_of_a_module_list_is_the_head() -> None:
    assert split(ListMLP())[0] == ["layers.0.weight", "layers.1.weight"]


@pytest.mark.parametrize("head", [True, False])
def test_blocks_in_a_module_list_are_hidden_layers(head: bool) -> None:
    rotated, plain = split(BlockMLP(head=head))
    assert rotated == [f"blocks.{i}.0.weight" for i in range(3)]
    assert ("out.weight" in plain) is head


def test_unlike_sequentials_side_by_side_are_not_repeated_blocks() -> None:
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    rotated, plain = split(nn.Sequential(features, classifier))
    assert rotated == ["0.0.weight"]
    assert "1.1.weight" in plain


def test_a_single_linear_is_a_head() -> None:
    assert split(nn.Linear(4, 3)) == ([], ["weight", "bias"])


def test_what_only_looks_like_a_matrix_is_not_rotated() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 1, bias=False)
            self.scale = nn.Parameter(torch.ones(1, 8))
            self.norm = nn.LayerNorm((4, 8))
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
            self.pointwise = nn.Conv1d(1, 8, 1, bias=False)
            self.bag = nn.EmbeddingBag(10, 8)
            self.temperature = nn.Parameter(torch.tensor(1.0))
            self.last = nn.Linear(8, 8, bias=False)

    assert split(Odd())[0] == []


def test_frozen_parameters_are_in_the_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).requires_grad_(False)
    assert split(model) == (["0.weight"], ["0.bias", "1.weight", "1.bias"])


def test_a_group_without_parameters_is_left_out() -> None:
    bare = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Embedding(4, 4))
    assert [group["rotate"] for group in param_groups(bare)] == [False]
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    assert [group["rotate"] for group in param_groups(convolutions)] == [True]
    assert param_groups(nn.ReLU()) == []


# --- exclude ----------------------------------------------------------------------


def test_exclude_takes_one_pattern_or_several() -> None:
    model = llama()
    q_proj = [name for name in LLAMA_MATRICES if "q_proj" in name]
    rotated, plain = split(model, exclude="*.q_proj.*")
    assert rotated == [name for name in LLAMA_MATRICES if name not in q_proj]
    assert set(q_proj) <= set(plain)
    rotated, _ = split(model, exclude=["*.q_proj.*", "model.layers.1.*"])
    assert rotated == [
        name for name in LLAMA_MATRICES if ".0." in name and name not in q_proj
    ]
    assert split(model, exclude="*")[0] == []


def test_exclude_may_name_what_is_not_rotated_anyway() -> None:
    assert split(llama(), exclude="lm_head.*")[0] == LLAMA_MATRICES


def test_exclude_knows_every_name_of_a_tied_parameter() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8, bias=False)
            self.b = nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight
            self.out = nn.Linear(8, 2, bias=False)

    assert split(Shared())[0] == ["a.weight"]
    assert split(Shared(), exclude="b.*")[0] == []


@pytest.mark.parametrize("exclude", ["*.router.*", ["*.q_proj.*", "*.router.*"]])
def test_a_pattern_that_matches_nothing_is_an_error(exclude: object) -> None:
    with pytest.raises(ValueError, match=r"'\*\.router\.\*' matches none.*remove it"):
        param_groups(llama(), exclude=exclude)


def test_a_list_of_parameters_is_refused() -> None:
    with pytest.raises(TypeError, match="expected an nn.Module, got list"):
        param_groups(list(nn.Linear(2, 2).parameters()))


# --- the log ----------------------------------------------------------------------


def report(
    caplog: pytest.LogCaptureFixture, model: nn.Module, **options: object
) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sharded_adadiag"):
        param_groups(model, **options)
    return "\n".join(record.message for record in caplog.records)


def test_what_went_where_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    text = report(caplog, llama(), exclude="*.q_proj.*")
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.INFO
    lines = text.splitlines()
    assert "rotated: 12 parameters, 3,840 elements" in lines
    assert "not rotated: 9 parameters, 1,872 elements" in lines
    assert "  model.layers.*.mlp.up_proj.weight x2 (24 x 16)" in lines
    assert "  model.layers.*.self_attn.q_proj.weight x2 (16 x 16, excluded)" in lines
    assert "  model.embed_tokens.weight (40 x 16, embedding)" in lines
    assert "  lm_head.weight (40 x 16, head)" in lines
    assert "  model.norm.weight (16, 1-D)" in lines
    assert lines[-1] == "output head: lm_head"


def test_a_model_without_a_head_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    text = report(caplog, llama().model)
    assert text.endswith("output head: none found")


def test_only_rank_zero_logs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert report(caplog, BlockMLP()) == ""
    monkeypatch.setenv("RANK", "0")
    assert report(caplog, BlockMLP()) != ""
