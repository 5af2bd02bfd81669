"""What is not rotated although it has two sides: the one list of it.

A rotation is for a matrix, a linear map whose inputs or outputs may be mixed. Plain
Adam suits everything, so a parameter in doubt is not rotated. ``param_groups`` asks the
types of modules and, where they do not tell, names; a DeepSpeed config file has no
modules, so there names and shapes must do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # of all batch and instance norms
from torch.nn.modules.conv import _ConvNd

MATRIX = "matrix"  # what is rotated
HEAD = "head"
EMBEDDING = "embedding"
POSITIONS = "position table"
TOKENS = "learned token"
ROUTER = "router"
STACK = "stack of matrices"
EXPERTS = "stacked experts"
DEPTHWISE = "depthwise convolution"
DIRECTION = "direction of a weight norm"


def _ends(parts: str) -> str:
    """Names whose last parts are these."""
    return rf"(?:^|\.){re.escape(parts)}$"


def _whole(name: str) -> str:
    """Just this name."""
    return rf"^{re.escape(name)}$"


def _under(part: str) -> str:
    """Names with this part, and anything below it."""
    return rf"(?:^|\.){re.escape(part)}\."


def _word(word: str) -> str:
    """Names whose last part has this word, unless it calls itself a matrix."""
    return rf"(?:^|\.)(?:[^.]+_)?{word}(?:_[^.]+)?$(?<!weight)(?<!proj)(?<!projection)"


def _last_word(word: str, last: str) -> str:
    """Names whose last part is this, and the one before ends in this word."""
    return rf"(?:^|\.)(?:[^.]+_)?{word}\.{last}$"


def _numbered(word: str) -> str:
    """Weights of a module whose name ends in this word, or of a list of such."""
    return _last_word(word, r"(?:\d+\.)?weight")


def _module_word(word: str) -> str:
    """Weights of a module whose name has this word, unless it is a projection."""
    maps = "patch|hidden|linear|dense|project|projection|projector|proj"
    return (
        rf"(?:^|\.)(?!(?:[^.]+_)?(?:{maps})[_.])(?:[^.]+_)?{word}(?:_[^.]+)?\.weight$"
    )


class OfType(NamedTuple):
    """A module type whose parameters, and those of its children, are not rotated.

    Attributes:
        what: The type.
        kind: Why they are not rotated, as it is logged.
        model: A model that needs the entry.
    """

    what: type[nn.Module]
    kind: str
    model: str


class Named(NamedTuple):
    """A pattern of names that are not rotated.

    Attributes:
        what: A regular expression that is found in the name.
        kind: Why they are not rotated, as it is logged.
        model: A model that needs the entry.
    """

    what: str
    kind: str
    model: str


# The later wins: a norm's or head's weight tied to an embedding is an embedding.
TYPES = (
    OfType(nn.LayerNorm, "norm", "gpt2"),
    OfType(nn.RMSNorm, "norm", "torchtitan's llama"),
    OfType(nn.GroupNorm, "norm", "wav2vec2"),
    OfType(_NormBase, "norm", "resnet"),
    OfType(nn.Embedding, EMBEDDING, "llama"),
    OfType(nn.EmbeddingBag, EMBEDDING, "dlrm"),
)

# No type tells these.
NAMES = (
    # One row per expert, whose gradient comes from that expert's tokens.
    Named(_under("router"), ROUTER, "gpt_oss; switch_transformers"),
    Named(_under("modality_router"), ROUTER, "gemma3n"),
    # Some models have several heads, and some are convolutions.
    Named(_last_word("classifier", "weight"), HEAD, "deit; segformer; detr"),
    Named(_numbered("class_embed"), HEAD, "rf_detr; deformable_detr; lw_detr"),
    Named(_numbered("(?:class|score)_head"), HEAD, "omdet-turbo; rt_detr"),
    Named(_last_word("logits", "weight"), HEAD, "torchvision's maskrcnn"),
    Named(_ends("cls_score.weight"), HEAD, "torchvision's fasterrcnn"),
    Named(_ends("kps_score_lowres.weight"), HEAD, "torchvision's keypointrcnn"),
    Named(_last_word("(?:aux|bpe|char)_head", "weight"), HEAD, "timm's volo; mgp-str"),
    Named(_ends("vision_head.weight"), HEAD, "janus"),
    Named(_ends("word_timestamp_head.weight"), HEAD, "nemo_speechlm"),
    Named(_ends("head_linear.weight"), HEAD, "ovis2"),
    Named(_last_word("head", r"decoder\.weight"), HEAD, "flava; camembert"),
    Named(_ends("decoder.output_projection.weight"), HEAD, "fsmt"),
    Named(_ends("seq_relationship.weight"), HEAD, "fnet; flava"),
    Named(_ends("AuxLogits.fc.weight"), HEAD, "torchvision's inception_v3"),
    Named(_last_word(r"aux\d", r"fc2\.weight"), HEAD, "torchvision's googlenet"),
    Named(r"^heads?(?:_dist)?\.\d+\.weight$", HEAD, "timm's crossvit, efficientvim"),
    Named(_ends("head.fc.weight"), HEAD, "timm's resnetv2"),
    Named(_ends("head.l.weight"), HEAD, "timm's repvit"),
    Named(_ends("head.linear.weight"), HEAD, "timm's levit"),
    Named(_ends("lm_head.weight"), HEAD, "bark"),
    Named(_ends("head.weight"), HEAD, "swiftformer; timm's deit"),
    Named(_ends("dist_head.weight"), HEAD, "swiftformer"),
    Named(_ends("head_dist.weight"), HEAD, "timm's deit"),
    Named(_ends("ctc_head.weight"), HEAD, "parakeet_ctc"),
    Named(_whole("fc.weight"), HEAD, "timm's dla"),
    # Two heads into one space, which the last linear layer alone would treat unlike.
    Named(_ends("text_projection.weight"), HEAD, "clip"),
    Named(_ends("visual_projection.weight"), HEAD, "clip"),
    Named(_ends("text_projection"), HEAD, "open_clip"),
    Named(_ends("visual.proj"), HEAD, "open_clip"),
    # Each entry is the parameter of a channel or head of its own.
    Named(_ends("A_log"), "decay", "mamba"),
    Named(_ends("mamba.D"), "scale", "zamba"),
    Named(_last_word("(?:l2_clip|norm)", "scale"), "scale", "inkling2"),
    Named(_ends("alpha"), "scale", "timm's efficientvim"),
    Named(_word("bias(?:es)?"), "bias", "gpt_oss; swin; levit; parakeet_ctc"),
    # Tables, of which a row is looked up or added where it belongs.
    Named(_word("pos(?:ition|itional)?"), POSITIONS, "sam; patchtst; open_clip"),
    Named(_word("ape"), POSITIONS, "glm5_next"),
    Named(_ends("height_rel"), POSITIONS, "timm's botnet"),
    Named(_ends("width_rel"), POSITIONS, "timm's botnet"),
    Named(_word("embed(?:dings?)?"), EMBEDDING, "mask2former; unispeech_sat"),
    Named(_under("lora_embedding_A"), EMBEDDING, "peft"),
    Named(_under("lora_embedding_B"), EMBEDDING, "peft"),
    Named(_word("tokens?"), TOKENS, "radio; vjepa2"),
    Named(_word("latents"), TOKENS, "perceiver"),
    Named(_ends("latent_query"), TOKENS, "kosmos2"),
    Named(_ends("multi_modal_projector.query"), TOKENS, "aria"),
    # Its length means nothing: the gradient has no part along it.
    Named(_ends("weight_v"), DIRECTION, "torch.nn.utils.weight_norm"),
    Named(_ends("parametrizations.weight.original1"), DIRECTION, "wav2vec2; encodec"),
    # Matrices laid one under the other in a 2-D parameter.
    Named(_ends("experts.mlp.w1"), STACK, "dbrx"),
    Named(_ends("experts.mlp.v1"), STACK, "dbrx"),
    Named(_ends("experts.mlp.w2"), STACK, "dbrx"),
    Named(_ends("o_a_proj.weight"), STACK, "deepseek_v4"),
    # A few coefficients for mixing the residual streams.
    Named(_ends("attn_hc.fn"), "hyper-connection", "deepseek_v4"),
    Named(_ends("ffn_hc.fn"), "hyper-connection", "deepseek_v4"),
    Named(_ends("hc_head.hc_fn"), "hyper-connection", "deepseek_v4"),
)

# The type of a module tells these, and better, where it is one of torch's.
USUAL_NAMES = (
    Named(_module_word("emb(?:eds?|eddings?|edder)?"), EMBEDDING, "llama; bert; xlm"),
    Named(_module_word("tokens"), EMBEDDING, "sam"),
    Named(_ends("wte.weight"), EMBEDDING, "gpt2"),
    Named(_ends("wpe.weight"), EMBEDDING, "gpt2"),
    Named(_ends("shared.weight"), EMBEDDING, "t5"),
    Named(_ends("relative_attention_bias.weight"), EMBEDDING, "t5"),
    Named(_ends("score.weight"), HEAD, "llama_cls"),
    Named(_ends("classifier.1.weight"), HEAD, "resnet"),
    Named(_ends("classifier.linear.weight"), HEAD, "levit"),
    Named(_ends("head.fc.fc2.weight"), HEAD, "timm's caformer"),
    Named(_ends("last_linear.weight"), HEAD, "timm's inception_v4"),
    Named(_whole("output.weight"), HEAD, "torchtitan's llama"),
)

# Which stacks are rotated, each matrix by itself.
_EXPERTS = re.compile(_under("experts"))
_GATE = re.compile(r"(?:^|\.)gate\.")
_CONVOLUTION = re.compile(r"conv[^.]*\.", re.IGNORECASE)
# What peft puts between a module's name and that of its weight.
_PEFT = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


def kind_by_name(name: str, names: Iterable[str], *, usual: bool) -> str:
    """What a parameter of two or more dimensions is, as its name tells.

    Args:
        name: The parameter's name.
        names: The names of all parameters: a gate beside experts is a router, while
            that of a gated MLP is a matrix.
        usual: No module type tells, so the usual names of embeddings and heads count
            as well.

    Returns:
        ``"matrix"`` if the name tells nothing.
    """
    name = _PEFT.sub("", name)
    for gate in _GATE.finditer(name):
        experts = re.compile(re.escape(name[: gate.start()]) + r"(?:^|\.)experts\.")
        if any(experts.match(other) for other in names):
            return ROUTER
    for entry in NAMES + USUAL_NAMES if usual else NAMES:
        if re.search(entry.what, name):
            return entry.kind
    return MATRIX


def kind_by_module(module: nn.Module, shape: Sequence[int]) -> str:
    """What a parameter of two or more dimensions is, as the type of its owner tells.

    Args:
        module: The module that has the parameter.
        shape: The parameter's logical shape.

    Returns:
        ``"matrix"`` for 2-D parameters and those of convolutions of one group.
    """
    if not isinstance(module, _ConvNd):
        return MATRIX if len(shape) == 2 else _stack(shape[0])
    if module.groups == 1:
        return MATRIX
    # Each group is a matrix of its own, and with one input channel not even that: an
    # output channel's few weights, which share no input with any other's.
    return DEPTHWISE if module.groups == module.in_channels else _stack(module.groups)


def kind_by_shape(name: str, shape: Sequence[int]) -> str:
    """What a parameter of two or more dimensions is if there is no module to ask.

    Args:
        name: The parameter's name.
        shape: Its logical shape.

    Returns:
        ``"matrix"`` if it may be one. The groups of a convolution do not show, unless
        each has one input; convolutions of one dimension must be called so.
    """
    if len(shape) == 2:
        return MATRIX
    if len(shape) > 3 or _CONVOLUTION.search(name):
        return DEPTHWISE if shape[1] == 1 else MATRIX
    return _stack(shape[0])


def is_stack_of_experts(name: str, module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a parameter is one matrix for each of several experts.

    Args:
        name: The parameter's name.
        module: Its owner.
        shape: Its logical shape.

    Returns:
        True for ``(experts, out, in)`` or ``(experts, in, out)``, both sides larger
        than one, if the module, or one that it is in, is called ``experts``, or its
        class has ``Experts`` in its name.
    """
    if len(shape) != 3 or min(shape[1:]) < 2 or isinstance(module, _ConvNd):
        return False
    return bool(_EXPERTS.search(name)) or "Experts" in type(module).__name__


def _stack(count: int) -> str:
    return f"stack of {count} matrices"
