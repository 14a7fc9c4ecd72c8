"""Single files, as communities share them: the names of the original implementation."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_base import write_tiny_base, write_tiny_xl_base
from torch import Tensor

from imprompt.bases import load_base
from imprompt.bases.stable_diffusion_xl import StableDiffusionXLBase
from imprompt.core.errors import ImpromptError

# From diffusers' names to the original ones, tried in this order, all that fit applied.
RESIDUAL_BLOCK = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
UNET_PLACES = [
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.0\.resnets\.0", "output_blocks.0.0"),
    (r"^up_blocks\.0\.resnets\.1", "output_blocks.1.0"),
    (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.1.1"),
    (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"^up_blocks\.1\.attentions\.0", "output_blocks.2.1"),
    (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
    (r"^up_blocks\.1\.attentions\.1", "output_blocks.3.1"),
]
XL_UNET_PLACES = [
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"^down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.1.2"),
    (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
]
OPEN_CLIP_PLACES = [
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"\.layer_norm(\d)", r".ln_\1"),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
    (r"\.self_attn\.q_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj", ".attn.out_proj"),
]
AUTOENCODER_PLACES = [
    (r"\.down_blocks\.(\d)\.resnets\.(\d)", r".down.\1.block.\2"),
    (r"\.down_blocks\.(\d)\.downsamplers\.0", r".down.\1.downsample"),
    (r"\.up_blocks\.0\.", ".up.2."),
    (r"\.up_blocks\.2\.", ".up.0."),
    (r"\.up_blocks\.1\.", ".up.1."),
    (r"(\.up\.\d)\.resnets\.(\d)", r"\1.block.\2"),
    (r"(\.up\.\d)\.upsamplers\.0", r"\1.upsample"),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]


def renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def original_names(folder: Path) -> dict[str, Tensor]:
    """All weights of a diffusers folder, named as in the original implementation."""
    is_xl = (folder / "text_encoder_2").is_dir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        name = renamed(name, XL_UNET_PLACES if is_xl else UNET_PLACES)
        if "transformer_blocks" not in name:
            name = renamed(name, RESIDUAL_BLOCK)
        tensors[f"model.diffusion_model.{name}"] = tensor
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[f"first_stage_model.{renamed(name, AUTOENCODER_PLACES)}"] = tensor
    prefix = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    for name, tensor in load_file(folder / "text_encoder/model.safetensors").items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"{prefix}.transformer.{name}"] = tensor
    if is_xl:
        tensors |= open_clip_names(load_file(folder / "text_encoder_2/model.safetensors"))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def open_clip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second encoder's weights: Q, K, V in one matrix, the projection transposed."""
    original: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        elif ".q_proj." in name:
            parts = (name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
            tensor = torch.cat([tensors[part] for part in parts])
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        original[f"conditioner.embedders.1.model.{renamed(name, OPEN_CLIP_PLACES)}"] = tensor
    return original


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny", image_encoder=False)


def test_a_single_file_is_the_same_model_as_its_folder(folder: Path, tmp_path: Path) -> None:
    save_file(original_names(folder), tmp_path / "community.safetensors")
    single = load_base(tmp_path / "community.safetensors", config=folder)
    base = load_base(folder)
    assert single.name == "community"
    assert single.fingerprint() == base.fingerprint()
    texts = ["a red cat", ""]
    assert torch.equal(single.tokenize(texts), base.tokenize(texts))
    states = base.encode_text(texts)
    assert torch.equal(single.encode_text(texts).sequence, states.sequence)
    latents = torch.randn(2, *base.latent_shape())
    assert torch.equal(single.denoise(latents, 5, states), base.denoise(latents, 5, states))
    assert torch.equal(single.decode_image(latents), base.decode_image(latents))
    assert not any(p.requires_grad for part in single.parts().values() for p in part.parameters())


def test_a_file_with_holes_or_of_other_shapes_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = original_names(folder)
    file = tmp_path / "community.safetensors"
    for part in (
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
        "first_stage_model.decoder.conv_in.weight",
        "model.diffusion_model.middle_block.1.norm.weight",
        "model.diffusion_model.output_blocks.3",
    ):
        holes = {name: x for name, x in tensors.items() if not name.startswith(part)}
        assert len(holes) < len(tensors)
        save_file(holes, file)
        with pytest.raises(ImpromptError, match="could not be read as a base"):
            load_base(file, config=folder)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**tensors, name: torch.zeros(3, 3, 3, 3)}, file)
    with pytest.raises(ImpromptError, match="could not be read as a base"):
        load_base(file, config=folder)


def test_what_it_needs_besides_is_told(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "community.safetensors"
    save_file(original_names(folder), file)
    with pytest.raises(ImpromptError, match=r"config=.* has no model_index\.json"):
        load_base(file, config=tmp_path)


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xl_base(tmp_path_factory.mktemp("bases") / "tiny-xl")


def test_an_xl_file_is_the_same_model_as_its_folder(xl_folder: Path, tmp_path: Path) -> None:
    save_file(original_names(xl_folder), tmp_path / "community.safetensors")
    single = load_base(tmp_path / "community.safetensors", config=xl_folder)
    base = load_base(xl_folder)
    assert isinstance(single, StableDiffusionXLBase)
    assert single.fingerprint() == base.fingerprint()
    texts = ["a red cat", None]
    states, again = base.encode_text(texts), single.encode_text(texts)
    assert torch.equal(again.sequence, states.sequence)
    assert states.pooled is not None and again.pooled is not None
    assert torch.equal(again.pooled, states.pooled)
    latents = torch.randn(2, *base.latent_shape())
    assert torch.equal(single.denoise(latents, 5, again), base.denoise(latents, 5, states))
    assert torch.equal(single.decode_image(latents), base.decode_image(latents))
    assert single.scheduler.config.prediction_type == "epsilon"


def test_an_xl_file_in_half_precision(xl_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "community.safetensors"
    save_file({name: x.half() for name, x in original_names(xl_folder).items()}, file)
    single = load_base(file, dtype=torch.float16, config=xl_folder)
    assert single.dtype == torch.float16 and single.vae.dtype == torch.float32


def test_a_file_that_says_it_predicts_v_is_believed(xl_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "community.safetensors"
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file({**original_names(xl_folder), **marks}, file)
    config = load_base(file, config=xl_folder).scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("said", "meant"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("", "epsilon")]
)
def test_so_is_one_whose_header_says_what_it_predicts(
    folder: Path, tmp_path: Path, said: str, meant: str
) -> None:
    file = tmp_path / "community.safetensors"
    save_file(original_names(folder), file, {"modelspec.prediction_type": said} if said else None)
    assert load_base(file, config=folder).scheduler.config.prediction_type == meant
    by_hand = load_base(file, config=folder, prediction_type="v_prediction")
    assert by_hand.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("mark", ["edm_vpred.sigma_max", "edm_mean"])
def test_models_of_other_noise_are_refused(xl_folder: Path, tmp_path: Path, mark: str) -> None:
    file = tmp_path / "cosxl.safetensors"
    save_file({**original_names(xl_folder), mark: torch.ones(1)}, file)
    with pytest.raises(ImpromptError, match="noise of another kind"):
        load_base(file, config=xl_folder)


def test_xl_files_with_holes_are_refused(xl_folder: Path, tmp_path: Path) -> None:
    tensors = original_names(xl_folder)
    file = tmp_path / "community.safetensors"
    for part in (
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight",
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
    ):
        save_file({name: x for name, x in tensors.items() if name != part}, file)
        with pytest.raises(ImpromptError, match="could not be read as a base"):
            load_base(file, config=xl_folder)


def test_a_config_of_another_kind_is_refused(folder: Path, xl_folder: Path, tmp_path: Path) -> None:
    for weights, config in ((folder, xl_folder), (xl_folder, folder)):
        file = tmp_path / f"{weights.name}.safetensors"
        save_file(original_names(weights), file)
        with pytest.raises(ImpromptError, match="could not be read as a base .*same shapes"):
            load_base(file, config=config)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conditioner.embedders.0.model.text_projection"], "is it the refiner"),
        (["conditioner.embedders.0.transformer.x"], r"without the text encoder .*embedders\.1"),
        (["model.diffusion_model.joint_blocks.0.x"], "diffusion transformer"),
        (["model.diffusion_model.double_blocks.0.x"], "diffusion transformer"),
    ],
)
def test_other_kinds_of_files_are_named(
    xl_folder: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    file = tmp_path / "community.safetensors"
    save_file({name: torch.ones(1) for name in ["model.diffusion_model.x", *names]}, file)
    with pytest.raises(ImpromptError, match=message):
        load_base(file, config=xl_folder)
