"""What goes where in models of torchvision, timm and peft, if they are installed."""

import fnmatch

import pytest
import torch
from support.architectures import built
from torch import nn

from sharded_adadiag import param_groups

# What these packages say of each other's and their own coming versions.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def rotated_of(model):
    return {
        name
        for group in param_groups(model)
        for name, _ in group["params"]
        if group["rotate"]
    }


def check_plain(model, patterns):
    """Of what has two sides these and depthwise convolutions are not rotated."""
    depthwise = {
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.conv._ConvNd) and m.groups == m.in_channels > 1
    }
    sides = {
        name
        for name, param in model.named_parameters()
        if param.dim() > 1 and min(param.shape[0], param[0].numel()) > 1
    }
    for pattern in patterns:
        assert fnmatch.filter(sides, pattern), pattern
    kept = {n for n in sides if any(fnmatch.fnmatch(n, p) for p in patterns)}
    assert rotated_of(model) == sides - kept - depthwise


def test_matrices_of_peft_are_rotated_and_its_tables_are_not():
    peft = pytest.importorskip("peft", reason="the extra [clients] is not installed")
    config = peft.LoraConfig(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["score"], r=2
    )
    with torch.device("meta"):
        # Its cached fellow is shared by other tests and must stay as it is.
        model = peft.get_peft_model(built.__wrapped__("llama_cls"), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_embedding_A" in name for name in trained)
    assert any(".score." in name for name in trained)
    wanted = {n for n in trained if fnmatch.fnmatch(n, "*.lora_[AB].default.weight")}
    assert wanted and rotated_of(model) & trained == wanted


TORCHVISION = {
    "resnet18": {"fc.weight"},
    "resnext50_32x4d": {"fc.weight", "layer*.*.conv2.weight"},
    "convnext_tiny": {"classifier.2.weight", "features.*.*.block.0.weight"},
    "swin_t": {"head.weight", "*.relative_position_bias_table"},
    "vit_b_16": {"heads.head.weight"},
    "mobilenet_v2": {"classifier.1.weight"},
    "maxvit_t": {"classifier.5.weight", "*.relative_position_bias_table"},
    "googlenet": {"fc.weight", "aux?.fc2.weight"},
    "inception_v3": {"fc.weight", "AuxLogits.fc.weight"},
    "keypointrcnn_resnet50_fpn": {
        "*.cls_logits.weight",
        "*.cls_score.weight",
        "*.kps_score_lowres.weight",
        "roi_heads.box_predictor.bbox_pred.weight",
    },
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="it is no dependency")
    options = {"weights_backbone": None} if "rcnn" in name else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **options)
    check_plain(model, TORCHVISION[name])


TIMM = {
    "botnet26t_256": {"head.fc.weight", "*.height_rel", "*.width_rel"},
    "caformer_s18": {"head.fc.fc2.weight"},
    "convnext_tiny": {"head.fc.weight"},
    "crossvit_9_240": {"head.?.weight"},
    "deit_tiny_distilled_patch16_224": {"head.weight", "head_dist.weight"},
    "dla34": {"fc.weight"},
    "efficientvim_m1": {"heads.?.weight", "stages.*.alpha"},
    "levit_128": {"head.linear.weight", "*.attention_biases", "head_dist.*.weight"},
    "mixer_b16_224": {"head.weight"},
    "repvit_m1": {"head.head*.l.weight"},
    "resnetv2_50x1_bit": {"head.fc.weight"},
    "swin_tiny_patch4_window7_224": {
        "*.relative_position_bias_table",
        "head.fc.*",
    },
    "volo_d1_224": {"head.weight", "aux_head.weight"},
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    timm = pytest.importorskip("timm", reason="it is no dependency")
    with torch.device("meta"):
        model = timm.create_model(name)
    check_plain(model, TIMM[name])
