"""The towers in plain torch compared with open_clip's own modules."""

from __future__ import annotations

import copy
from dataclasses import asdict

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn.functional import normalize

from heimdex_clip_worker.errors import ModelError
from heimdex_clip_worker.model import tower
from heimdex_clip_worker.model.tower import TextTower, VisionTower, from_open_clip
from heimdex_clip_worker.model.weights import text_weights

pytestmark = pytest.mark.model

END = 49_407  # the end-of-text token of CLIP's tokenizer, its highest number


def covers(config: dict) -> tuple[bool, bool]:
    """Tell whether the image tower and the text tower of a model are computed here."""
    shapes = tower.image_shape(config, "gelu"), tower.text_shape(config, "gelu")
    return shapes[0] is not None, shapes[1] is not None


def shorter(model_name: str, layers: int) -> dict:
    """Build a published architecture's config with fewer layers."""
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


def test_numbers_that_a_config_leaves_out_are_open_clips_defaults():
    needed = {"layers": 1, "patch_size": 16}
    vision, text = asdict(CLIPVisionCfg()), asdict(CLIPTextCfg())
    config = {"embed_dim": 48, "vision_cfg": needed, "text_cfg": {}}
    used = ("image_size", "width", "head_width", "mlp_ratio")
    stated = {"embed_dim": 48, "vision_cfg": {key: vision[key] for key in used} | needed}
    used = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    stated["text_cfg"] = {key: text[key] for key in used}
    assert tower.image_shape(config, "gelu") == tower.image_shape(stated, "gelu") is not None
    assert tower.text_shape(config, "gelu") == tower.text_shape(stated, "gelu") is not None


def references(config: dict, activation: str) -> CLIP:
    """Build open_clip's model of a config with random weights, biases included."""
    torch.manual_seed(0)
    clip = CLIP(**{**config, "quick_gelu": activation == "quickgelu"}).eval().requires_grad_(False)
    for name, weight in clip.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.1)
    return clip


def texts(count: int, length: int) -> torch.Tensor:
    """Make token rows that end at different places, the last one at the very end."""
    rows = torch.randint(1, 40_000, (count, length))
    for row, end in enumerate([*range(2, 2 + 3 * (count - 1), 3), length - 1]):
        rows[row, end], rows[row, end + 1 :] = END, 0
    return rows


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_towers_equal_open_clips(name, activation):
    config, clip = CONFIGS[name], references(CONFIGS[name], activation)
    state = clip.state_dict()
    shape, words = tower.image_shape(config, activation), tower.text_shape(config, activation)
    visual = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    image = VisionTower.load(shape, from_open_clip(visual, shape))
    text = TextTower.load(words, from_open_clip(text_weights(state), words))
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
    shape = tower.text_shape(config, "gelu")
    state = text_weights(references(config, "gelu").state_dict())
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
def test_an_unknown_key_or_value_is_not_covered(part, change):
    config = copy.deepcopy(CONFIGS["ViT-B-32"])
    config[part].update(change)
    assert covers(config) == (part == "text_cfg", part == "vision_cfg")


def test_an_unknown_key_of_the_model_is_not_covered_either():
    config = {**CONFIGS["ViT-B-32"], "multimodal_cfg": {}}
    assert covers(config) == (False, False)
    assert not covers({**CONFIGS["ViT-B-32"], "custom_text": True})[1]


def test_every_covered_architecture_has_the_weights_of_open_clips_transformer():
    """Names and shapes of the weights agree, for every covered model that open_clip knows."""
    count = 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not all(covers(config)):
            continue
        with torch.device("meta"):
            state = CLIP(**{**config, "quick_gelu": False}).state_dict()
            visual = {n[7:]: t for n, t in state.items() if n.startswith("visual.")}
            image, text = tower.image_shape(config, "gelu"), tower.text_shape(config, "gelu")
            VisionTower.load(image, from_open_clip(visual, image))
            TextTower.load(text, from_open_clip(text_weights(state), text))
        count += 1
    assert count > 25


def test_weights_of_another_tower_are_refused():
    config = CONFIGS["small, odd ratio, patch dropout"]
    state, shape = references(config, "gelu").state_dict(), tower.image_shape(config, "gelu")
    visual = {n[7:]: t for n, t in state.items() if n.startswith("visual.")}
    with pytest.raises(ModelError, match="1 too many, extra"):
        from_open_clip({**visual, "extra": torch.zeros(1)}, shape)
    with pytest.raises(ModelError, match="no proj"):
        from_open_clip({n: t for n, t in visual.items() if n != "proj"}, shape)
    with pytest.raises(ModelError, match="project.weight"):
        VisionTower.load(shape, from_open_clip({**visual, "proj": torch.zeros(96, 47)}, shape))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ModelError, match="CLIP_PRECISION='fp8' must be auto or fp32, fp16, bf16"):
        tower.pick_precision("fp8", "cpu")
