"""The towers in plain torch against open_clip's own modules."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch.nn.functional import normalize

from heimdex_clip_worker.errors import ModelError
from heimdex_clip_worker.tower import (
    TextTower,
    VisionTower,
    covers,
    from_open_clip,
    image_shape,
    pick_precision,
    text_part,
    text_shape,
)

END = 49_407  # the end-of-text token of CLIP's tokenizer, its highest number


def shorter(model_name: str, layers: int) -> dict:
    """Return a published architecture's config with fewer layers."""
    config = copy.deepcopy(open_clip.get_model_config(model_name))
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    return config


CONFIGS = {
    "ViT-B-32": open_clip.get_model_config("ViT-B-32"),
    "ViT-L-14, 2 layers": shorter("ViT-L-14", 2),
    "ViT-H-14, 1 layer, heads of 80": shorter("ViT-H-14", 1),
    "small, odd ratio, patch dropout": {
        "embed_dim": 48,
        "vision_cfg": {
            "image_size": 60, "layers": 3, "width": 96, "head_width": 24, "patch_size": 12,
            "mlp_ratio": 3.3, "patch_dropout": 0.5,
        },
        "text_cfg": {"width": 64, "heads": 2, "layers": 3, "mlp_ratio": 2.5},
    },
}  # fmt: skip


def references(config: dict, activation: str) -> CLIP:
    """Return open_clip's model of a config with random weights, biases included."""
    torch.manual_seed(0)
    clip = CLIP(**{**config, "quick_gelu": activation == "quickgelu"}).eval().requires_grad_(False)
    for name, weight in clip.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.1)
    return clip


def texts(count: int, length: int) -> torch.Tensor:
    """Return token rows that end at different places, the last one at the very end."""
    rows = torch.randint(1, 40_000, (count, length))
    for row, end in enumerate([*range(2, 2 + 3 * (count - 1), 3), length - 1]):
        rows[row, end], rows[row, end + 1 :] = END, 0
    return rows


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_towers_equal_open_clips(name, activation):
    config, clip = CONFIGS[name], references(CONFIGS[name], activation)
    state = clip.state_dict()
    shape, words = image_shape(config, activation), text_shape(config, activation)
    seen = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    image = VisionTower.load(shape, from_open_clip(seen, shape))
    text = TextTower.load(words, from_open_clip(text_part(state), words))
    pixels, tokens = torch.randn(3, 3, shape.image_size, shape.image_size), texts(3, 77)
    with torch.inference_mode():
        pairs = [
            (image(pixels), clip.encode_image(pixels)),
            (text(tokens), clip.encode_text(tokens)),
        ]
    for rows, expected in pairs:
        assert (normalize(rows) - normalize(expected)).abs().max() < 1e-5
        assert ((rows - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_a_text_alone_and_beside_a_longer_one_has_the_same_row():
    config = CONFIGS["small, odd ratio, patch dropout"]
    shape = text_shape(config, "gelu")
    state = text_part(references(config, "gelu").state_dict())
    text, tokens = TextTower.load(shape, from_open_clip(state, shape)), texts(4, 77)
    together = text(tokens)
    assert all(torch.allclose(text(tokens[i : i + 1])[0], together[i], atol=1e-5) for i in range(4))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision_cfg", {"attentional_pool": True}),
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}),
        ("vision_cfg", {"no_ln_pre": True}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"final_ln_after_pool": True}),
        ("vision_cfg", {"ls_init_value": 1e-4}),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}),
        ("vision_cfg", {"block_type": "custom"}),
        ("vision_cfg", {"qk_norm": True}),
        ("vision_cfg", {"scale_fc": True}),
        ("vision_cfg", {"image_size": [224, 288]}),
        ("vision_cfg", {"image_size": 230}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}),
        ("vision_cfg", {"width": 200, "head_width": 64}),
        ("vision_cfg", {"a_key_of_tomorrow": 0}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("text_cfg", {"hf_tokenizer_name": "bert-base-uncased"}),
        ("text_cfg", {"embed_cls": True}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"pool_type": "eos"}),
        ("text_cfg", {"pool_type": "last"}),
        ("text_cfg", {"proj_type": "none"}),
        ("text_cfg", {"proj_bias": True}),
        ("text_cfg", {"ls_init_value": 1e-4}),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}),
        ("text_cfg", {"heads": 7}),
        ("text_cfg", {"a_key_of_tomorrow": 0}),
    ],
)
def test_what_is_not_known_is_not_covered(part, change):
    config = copy.deepcopy(CONFIGS["ViT-B-32"])
    config[part].update(change)
    image, text = covers(config), covers(config, "text")
    assert (image, text) == (part == "text_cfg", part == "vision_cfg")


def test_an_unknown_key_of_the_model_is_not_covered_either():
    config = {**CONFIGS["ViT-B-32"], "multimodal_cfg": {}}
    assert not covers(config) and not covers(config, "text")
    assert not covers({**CONFIGS["ViT-B-32"], "custom_text": True}, "text")


def test_every_covered_architecture_is_one_of_open_clips_own_transformers():
    """The names and shapes of the weights agree, for every covered model that open_clip knows."""
    counted = 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not (covers(config) and covers(config, "text")):
            continue
        with torch.device("meta"):
            state = CLIP(**{**config, "quick_gelu": False}).state_dict()
            seen = {n[7:]: t for n, t in state.items() if n.startswith("visual.")}
            image, text = image_shape(config, "gelu"), text_shape(config, "gelu")
            VisionTower.load(image, from_open_clip(seen, image))
            TextTower.load(text, from_open_clip(text_part(state), text))
        counted += 1
    assert counted > 25


def test_weights_that_are_not_the_towers_are_refused():
    config = CONFIGS["small, odd ratio, patch dropout"]
    state, shape = references(config, "gelu").state_dict(), image_shape(config, "gelu")
    seen = {n[7:]: t for n, t in state.items() if n.startswith("visual.")}
    with pytest.raises(ModelError, match="1 too many, extra"):
        from_open_clip({**seen, "extra": torch.zeros(1)}, shape)
    with pytest.raises(ModelError, match="no proj"):
        from_open_clip({n: t for n, t in seen.items() if n != "proj"}, shape)
    with pytest.raises(ModelError, match="project.weight"):
        VisionTower.load(shape, from_open_clip({**seen, "proj": torch.zeros(96, 47)}, shape))


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(ModelError, match="CLIP_PRECISION='fp8' must be auto or fp32, fp16, bf16"):
        pick_precision("fp8", "cpu")
