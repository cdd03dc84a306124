"""SAM as a foundation model, on a network of two layers and 64 pixels with random weights."""

import math
import re

import pytest
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.frozen_weights import leave_out_of_state_dict
from nnunetv2_semi.networks.sam import SAMFoundation, unit_range
from nnunetv2_semi.networks.sam_weights import resized_position_embedding, resized_relative_positions
from nnunetv2_semi.teachers import EMATeacher

transformers = pytest.importorskip("transformers")

# transformers' names and those of SAM's original code; the remaining ones are equal but for the prefix.
TO_ORIGINAL = [
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"image_encoder\.layers", "image_encoder.blocks"),
    (r"neck\.conv1", "neck.0"), (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"), (r"neck\.layer_norm2", "neck.3"),
    (r"mask_embed\.conv1", "mask_downscaling.0"), (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"), (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"encoder\.point_embed\.", "encoder.point_embeddings."),
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"layer_norm_final_attn", "norm_final_attn"), (r"layer_norm(\d)", r"norm\1"),
    (r"upscale_conv1", "output_upscaling.0"), (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"((?:mlps\.\d+|head))\.layers\.0", r"\1.layers.1"), (r"((?:mlps\.\d+|head))\.proj_in", r"\1.layers.0"),
    (r"((?:mlps\.\d+|head))\.proj_out", r"\1.layers.2"),
]


def tiny_model(num_masks=3):
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
                       "patch_size": 8, "window_size": 3, "global_attn_indexes": [1], "output_channels": 16,
                       "num_pos_feats": 8, "mlp_dim": 64, "initializer_range": 0.02},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
                             "num_multimask_outputs": num_masks,
                             "iou_head_hidden_dim": 16})
    model = transformers.SamModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that none is zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny_sam")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def original_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "sam_tiny.pth"
    state = {}
    for name, value in tiny_model().state_dict().items():
        if name == "prompt_encoder.shared_embedding.positional_embedding":
            continue
        for pattern, replacement in TO_ORIGINAL:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    torch.save(state, path)
    return path


def foundation(folder, channels=1, classes=4, **options):
    torch.manual_seed(1)
    return SAMFoundation.from_weights(str(folder), channels, classes, **options)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("spatial", [(64, 64), (40, 57), (100, 80)])
def test_any_patch_gives_a_map_a_class(folder, channels, spatial):
    model, image = foundation(folder, channels, 5), torch.randn(2, channels, *spatial)
    logits = model(image)
    # A patch embedding of 8 pixels and a decoder that enlarges four times: half of 64.
    assert logits.shape == (2, 5, 32, 32)
    assert model.at_patch_grid(logits, spatial).shape == (2, 5, *spatial)


def test_every_mask_token_but_the_first_is_a_class(folder):
    model = foundation(folder, classes=6)
    decoder, image = model.model.mask_decoder, torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        for token in range(7):
            before = model(image)
            decoder.output_hypernetworks_mlps[token].proj_out.bias.add_(1)
            differs = [(model(image) - before)[:, k].abs().max() > 1e-6 for k in range(6)]
            assert differs == [token - 1 == k for k in range(6)]
    assert len(decoder.mask_tokens.weight) == 7


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_trains_gets_a_gradient_and_nothing_else(folder, channels, checkpointing):
    model = foundation(folder, channels, checkpointing=checkpointing).train()
    for name, parameter in model.named_parameters():
        if "_up." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model(torch.randn(2, channels, 48, 48)).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained >= {name for name, p in model.named_parameters() if p.requires_grad and "k_proj.bias" not in name}
    assert trained <= {name for name, p in model.named_parameters() if p.requires_grad}
    encoder = {name.removeprefix("model.vision_encoder.") for name in trained if "vision_encoder" in name}
    assert encoder == {f"layers.{layer}.attn.qkv.{part}_{way}.weight" for layer in (0, 1) for part in ("query", "value")
                       for way in ("down", "up")}
    assert {name for name in trained if "prompt_encoder" in name} == {"model.prompt_encoder.no_mask_embed.weight"}
    assert ("to_three_channels.weight" in trained) == (channels == 2)


def test_checkpointing_changes_no_gradient(folder):
    gradients = []
    for checkpointing in (False, True):
        model, image = foundation(folder, checkpointing=checkpointing).train(), torch.ones(1, 1, 8, 8).triu()
        model(image).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_frozen_weights_from_a_file_are_named_and_a_checkpoint_can_do_without(folder):
    model = foundation(folder)
    names = set(model.frozen_names())
    state = model.state_dict()
    assert names == {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad
                     and not re.search(r"iou_prediction|mlps\.0\.", name)}, "what started anew is not from the file"
    other = foundation(folder)
    leave_out_of_state_dict(model, names)
    kept = model.state_dict()
    assert kept.keys() == state.keys() - names
    model.load_state_dict(kept)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert other.load_state_dict(kept, strict=False).unexpected_keys == []
    image = torch.randn(1, 1, 64, 64)
    assert torch.equal(other(image), model(image))


def test_random_weights_are_frozen_and_come_from_no_file():
    model = SAMFoundation(tiny_model(4), 1)
    assert model.frozen_names() == []
    assert not model.model.vision_encoder.pos_embed.requires_grad


def test_teacher_shares_the_frozen_encoder(folder):
    model = foundation(folder)
    teacher = EMATeacher(model)
    shared = {id(p) for p in teacher.network.parameters()} & {id(p) for p in model.parameters()}
    assert shared == {id(p) for p in model.parameters() if not p.requires_grad}
    image = torch.randn(1, 1, 64, 64)
    assert torch.allclose(teacher(image), model(image), atol=1e-6)  # kernels with and without a graph may differ


def test_half_precision_gives_about_the_same(folder):
    model, image = foundation(folder, 2), torch.randn(2, 2, 64, 64)
    expected = model.at_patch_grid(model(image), (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image)
        own = model.at_patch_grid(logits, (64, 64))
        own.square().mean().backward()
    assert own.dtype == torch.float32
    assert (own - expected).abs().max() < 0.05 * expected.abs().max()


# input


def test_patches_are_scaled_to_the_unit_range_channel_by_channel():
    image = torch.tensor([[[[-3.0, 1.0]], [[5.0, 5.0]]], [[[0.0, 2.0]], [[-1.0, 0.0]]]])
    expected = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]], [[[0.0, 1.0]], [[0.0, 1.0]]]])
    assert torch.equal(unit_range(image), expected)


def test_medsam_gets_the_unit_range_and_sam_normalised_photographs(folder):
    image = torch.randn(1, 1, 64, 64) * 4 + 2
    medsam = foundation(folder, normalisation="medsam").pixels(image)
    assert medsam.shape == (1, 3, 64, 64)
    assert torch.allclose(medsam, unit_range(image).expand(1, 3, 64, 64))
    sam = foundation(folder, normalisation="sam").pixels(image)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    assert torch.allclose(sam, (255 * medsam - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-5)


def test_three_channels_stay_and_others_start_as_their_mean(folder):
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(foundation(folder, 3, normalisation="medsam").pixels(image), unit_range(image))
    image = torch.randn(1, 4, 64, 64)
    expected = unit_range(image).mean(1, keepdim=True).expand(1, 3, 64, 64)
    assert torch.allclose(foundation(folder, 4, normalisation="medsam").pixels(image), expected, atol=1e-6)


# weights


def plain(model, image):
    """Logits of transformers' own model, prompted with nothing."""
    return model(pixel_values=image, multimask_output=True).pred_masks[:, 0]


@pytest.mark.parametrize("layout", ["folder", "original_file"])
def test_both_layouts_give_the_saved_models_masks(layout, request):
    model = foundation(request.getfixturevalue(layout), 3, 3, normalisation="medsam")
    image = torch.rand(1, 3, 64, 64)
    assert model.notes == ["SAM's mask tokens are the file's, which has them for 3 classes too."]
    assert torch.allclose(model(image), plain(tiny_model(), model.pixels(image)), atol=1e-6)


def test_other_numbers_of_classes_start_their_heads_anew_and_say_so(folder):
    model, saved = foundation(folder, classes=2), tiny_model().state_dict()
    assert len(model.notes) == 1 and "2 classes" in model.notes[0]
    own = model.model.state_dict()
    assert torch.equal(own["mask_decoder.iou_token.weight"], saved["mask_decoder.iou_token.weight"])
    assert own["mask_decoder.mask_tokens.weight"].std() > 0.5, "as the original code starts them, not with 0.02"


def naive_resized(values, length):
    """Linear interpolation of a list at the centres of ``length`` equal parts, ends held."""
    result = []
    for index in range(length):
        position = min(max((index + 0.5) * len(values) / length - 0.5, 0), len(values) - 1)
        low = math.floor(position)
        high = min(low + 1, len(values) - 1)
        result.append((1 - (position - low)) * values[low] + (position - low) * values[high])
    return torch.stack(result)


@pytest.mark.parametrize("length", [3, 7, 15, 31, 40])
def test_resized_relative_positions_equal_a_naive_form(length):
    positions = torch.randn(15, 4, dtype=torch.float32)
    assert torch.allclose(resized_relative_positions(positions, length), naive_resized(list(positions), length),
                          atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (12, 6)])
def test_resized_position_embedding_equals_a_naive_form(grid):
    embedding = torch.randn(1, 8, 8, 5)
    rows = naive_resized(list(embedding[0]), grid[0])
    both = naive_resized(list(rows.transpose(0, 1)), grid[1]).transpose(0, 1)
    assert torch.allclose(resized_position_embedding(embedding, grid)[0], both, atol=1e-5)


@pytest.mark.parametrize("layout", ["folder", "original_file"])
def test_another_input_size_resizes_positions_of_global_layers_alone(layout, request):
    model, saved = foundation(request.getfixturevalue(layout), 1, 3, image_size=96), tiny_model().vision_encoder
    assert model(torch.randn(1, 1, 50, 50)).shape == (1, 3, 48, 48)
    assert "64 pixels to 96" in model.notes[0]
    encoder = model.model.vision_encoder
    windowed, everywhere = encoder.layers[0].attn, encoder.layers[1].attn
    assert torch.equal(windowed.rel_pos_h, saved.layers[0].attn.rel_pos_h)
    for own, old in ((everywhere.rel_pos_h, saved.layers[1].attn.rel_pos_h),
                     (everywhere.rel_pos_w, saved.layers[1].attn.rel_pos_w)):
        assert torch.allclose(own, naive_resized(list(old), 23), atol=1e-6)
    assert encoder.pos_embed.shape == (1, 12, 12, 32)
    assert not everywhere.rel_pos_h.requires_grad and "model.vision_encoder.pos_embed" in model.frozen_names()


def test_pytorchs_own_file_in_a_folder_is_read_too(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    image = torch.randn(1, 1, 64, 64)
    assert torch.equal(foundation(tmp_path, classes=3)(image), foundation(folder, classes=3)(image))


def changed(original_file, tmp_path, change):
    state = torch.load(original_file)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


@pytest.mark.parametrize(("change", "named"), [
    (lambda s: s.pop("image_encoder.blocks.1.attn.qkv.bias"), "vision_encoder.layers.1.attn.qkv.bias"),
    (lambda s: s.pop("image_encoder.pos_embed"), "vision_encoder.pos_embed"),
    (lambda s: s.update({"image_encoder.blocks.0.adapter.weight": torch.ones(1)}), r"it has .*blocks\.0\.adapter"),
    (lambda s: s.update({"mask_decoder.output_upscaling.0.bias": torch.ones(9)}), r"upscale_conv1.bias is \(9,\)"),
    (lambda s: [s.pop(name) for name in list(s) if name.startswith("mask_decoder")], "mask_decoder.iou_token.weight"),
    (lambda s: s.update({name: torch.ones(15, s[name].shape[1]) for name in list(s) if "rel_pos" in name}),
     "do not tell which layers attend within windows"),
])
def test_weights_that_do_not_fit_are_named(original_file, tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        foundation(changed(original_file, tmp_path, change))


def test_a_folder_that_lacks_a_parameter_is_refused(folder, tmp_path):
    state = tiny_model().state_dict()
    del state["vision_encoder.neck.conv1.weight"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"1 are missing \(vision_encoder.neck.conv1.weight\)"):
        foundation(tmp_path)


def test_other_models_and_sizes_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="multiple of 8 pixels, got 60"):
        foundation(folder, image_size=60)
    torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "unet.pth")
    with pytest.raises(UserError, match="image_encoder"):
        foundation(tmp_path / "unet.pth")
    with pytest.raises(UserError, match=r"config\.json"):
        foundation(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    with pytest.raises(UserError, match="sam2"):
        foundation(tmp_path)
