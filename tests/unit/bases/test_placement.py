"""Devices, precisions, and the ways to save memory or time: none of them changes the picture."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from slow import needs_slow_tests
from tiny_base import VISION_EMBED_DIM, build_parts, write_tiny_base, write_tiny_xl_base
from torch import Tensor, nn

from imprompt import ImagePrompt, create_adapter, generate
from imprompt.adapters.attention import CONDITION_KEY
from imprompt.bases import Base, ClipImageEncoder, load_base, offload
from imprompt.bases.turns import OneAtATime
from imprompt.core.errors import ImpromptError

PICTURE = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=["1", "XL"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    write = {"1": write_tiny_base, "XL": write_tiny_xl_base}[request.param]
    return load_base(write(tmp_path / "tiny"))


def draw(base: Base) -> numpy.ndarray:
    """Two images, in two batches."""
    adapter = create_adapter(base.unet, feature_dim=VISION_EMBED_DIM)
    images = generate(
        base,
        ["red cat", "cat"],
        ImagePrompt(PICTURE, adapter=adapter, scale=0.8),
        steps=3,
        batch_size=1,
        image_encoder=base.image_encoder or ClipImageEncoder(build_parts()["image_encoder"]),
        progress=False,
    )
    return numpy.stack([numpy.asarray(image, dtype=numpy.float64) for image in images])


def slice_decoding(base: Base) -> None:
    base.vae.enable_slicing()


def slice_attention(base: Base) -> None:
    base.unet.set_attention_slice(1)


def reorder(base: Base) -> None:
    base.unet.to(memory_format=torch.channels_last)


def offload_one_at_a_time(base: Base) -> None:
    offload(base, "cpu")


def offload_layers(base: Base) -> None:
    base.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )


@pytest.mark.parametrize(
    "option",
    [
        slice_decoding,
        slice_attention,
        reorder,
        offload_one_at_a_time,
        offload_layers,
    ],
)
def test_what_saves_memory_leaves_the_picture(base: Base, option: Callable[[Base], None]) -> None:
    expected = draw(base)
    option(base)
    assert abs(draw(base) - expected).max() <= 1
    assert abs(draw(base) - expected).max() <= 1  # and again


def test_eight_bit_storage_leaves_nearly_the_picture(base: Base) -> None:
    expected = draw(base)
    base.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    stored = {p.dtype for name, p in base.unet.named_parameters() if "to_q" in name}
    assert stored == {torch.float8_e4m3fn} and base.dtype == torch.float32
    drawn = draw(base)
    assert 0 < abs(drawn - expected).mean() < 10


def test_tiled_decoding_of_large_pictures(base: Base) -> None:
    latents = torch.randn(1, *base.latent_shape(128))
    expected = base.decode_image(latents)
    base.vae.enable_tiling()
    tiled = base.decode_image(latents)
    assert tiled.shape == expected.shape
    assert not torch.equal(tiled, expected)  # there were tiles


class Places:
    """Which networks were on their device at the same time, as far as that can be told here."""

    def __init__(self, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moves: list[tuple[str, str]] = []
        self.where = dict.fromkeys(base.parts(), "cpu")
        names = {id(network): name for name, network in base.parts().items()}

        def move(network: nn.Module, device: torch.device) -> None:
            name = names[id(network)]
            if self.where[name] != device.type:
                self.where[name] = device.type
                self.moves.append((name, device.type))
                assert sum(place == "cuda" for place in self.where.values()) <= 1

        monkeypatch.setattr("imprompt.bases.turns._move", move)


def test_offloaded_networks_take_turns(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """As there is no second device here, the moves are recorded instead of made."""
    places = Places(base, monkeypatch)
    offload(base, "cpu")
    for network in base.parts().values():
        hook = network._hf_hook
        assert isinstance(hook, OneAtATime)
        hook.execution_device = torch.device("cuda")
    monkeypatch.setattr(type(base), "device", torch.device("cpu"))
    monkeypatch.setattr(ClipImageEncoder, "device", torch.device("cpu"))
    expected_turns = [name for name in base.parts() if name.startswith("text_encoder")]
    if base.image_encoder is not None:
        expected_turns += ["image_encoder"]
    draw(base)
    turns = [name for name, device in places.moves if device == "cuda"]
    assert turns == [*expected_turns, "unet", "vae"]


def test_moving_ends_an_offload(base: Base) -> None:
    before = {name: repr(network) for name, network in base.parts().items()}
    forwards = {name: network.forward for name, network in base.parts().items()}
    offload(base, "cpu")
    assert base.device == torch.device("cpu")
    base.to("cpu")
    for name, network in base.parts().items():
        assert not hasattr(network, "_hf_hook")
        assert repr(network) == before[name]
        assert network.forward == forwards[name]


def test_where_it_computes_is_not_where_it_waits(base: Base) -> None:
    offload(base, "meta")
    assert base.device == torch.device("meta")
    assert next(base.unet.parameters()).device == torch.device("cpu")


def test_an_offloaded_image_encoder_reads_pixels_where_it_computes(tmp_path: Path) -> None:
    base = load_base(write_tiny_base(tmp_path / "tiny"))
    encoder = base.image_encoder
    assert encoder is not None
    offload(base, "meta")
    assert encoder.device == torch.device("meta")
    assert encoder.embeds(PICTURE[None]).is_meta and encoder.zero_hidden_states().is_meta


def test_the_text_waits_for_weights_that_are_offloaded(base: Base) -> None:
    """What is computed before the first step cannot use what only the first step brings."""
    adapter = create_adapter(base.unet, feature_dim=VISION_EMBED_DIM)
    text_states = base.encode_text(["cat"]).sequence
    with adapter.install(base.unet) as handle:
        condition = handle.condition(adapter.tokens(torch.zeros(1, VISION_EMBED_DIM)))
        [here] = handle.prepare([condition], text_states)
        [elsewhere] = handle.prepare([condition], text_states.to("meta"))
    assert all(site.text is not None for site in here[CONDITION_KEY].values())
    assert all(site.text is None for site in elsewhere[CONDITION_KEY].values())


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu", "nothing:1:2"])
def test_devices_that_are_not_there(tmp_path: Path, device: str) -> None:
    available = torch.cuda.is_available() or torch.backends.mps.is_available()
    if device in ("cuda", "mps") and available:
        pytest.skip("there is one")
    folder = write_tiny_base(tmp_path / "tiny")
    with pytest.raises(ImpromptError, match=r"here is: cpu"):
        load_base(folder, device=device)
    with pytest.raises(ImpromptError, match=r"here is: cpu"):
        offload(load_base(folder), device)


COMPILED = """
import sys
sys.path.insert(0, "tests")
import pathlib, tempfile
import numpy, torch
from tiny_base import *
from imprompt import ImagePrompt, create_adapter, generate, load_base
from imprompt.bases import ClipImageEncoder

kind, backend = sys.argv[1:]
folder = pathlib.Path(tempfile.mkdtemp()) / "tiny"
base = load_base((write_tiny_xl_base if kind == "XL" else write_tiny_base)(folder))
adapter = create_adapter(base.unet, feature_dim=VISION_EMBED_DIM)
encoder = ClipImageEncoder(build_parts()["image_encoder"])

def draw(scale, steps, text="red cat"):
    prompt = ImagePrompt(torch.zeros(3, 16, 16), adapter=adapter, scale=scale)
    [image] = generate(
        base, text, prompt, steps=steps, image_encoder=encoder, progress=False, seed=steps
    )
    return numpy.asarray(image, dtype=float)

calls = [(0.8, 3), (0.5, 2), (0.8, 4)]
expected = [draw(*call) for call in calls]
bare = draw(0.0, 2)
base.unet.compile(backend=backend, fullgraph=True)
counters = torch._dynamo.utils.counters["stats"]
for call, image in zip(calls, expected):
    assert abs(draw(*call) - image).max() <= 1, call
    graphs = counters["unique_graphs"]
    print(call, graphs)
    assert graphs <= 1, f"compiled anew: {graphs} graphs"
assert abs(draw(0.0, 2) - bare).max() <= 1
assert abs(expected[1] - bare).max() > 1
"""


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("XL", "eager"),
        pytest.param(
            "1",
            "inductor",
            marks=[pytest.mark.slow, needs_slow_tests("takes a minute or two")],
        ),
    ],
)
def test_a_compiled_denoiser_keeps_its_image_prompts(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, backend: str
) -> None:
    # In a process of its own, where no runtime type checks stand between the compiler and the code.
    result = subprocess.run(
        [sys.executable, "-c", COMPILED, kind, backend],
        env={
            "PYTHONPATH": str(request.config.rootpath / "src"),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
        cwd=request.config.rootpath,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


def test_a_tensor_of_text_states_moves_whole(base: Base) -> None:
    states = base.encode_text(["cat"])
    moved = states.to("meta", torch.float16)
    tensors: list[Tensor | None] = [moved.sequence, moved.pooled]
    assert all(x is None or (x.is_meta and x.dtype == torch.float16) for x in tensors)
