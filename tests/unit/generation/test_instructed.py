"""Image prompts that are told what to take, and guidance over image, text and instruction apart."""

import pytest
import torch
from PIL import Image

from imprompt import ImagePrompt, create_adapter, generate
from imprompt.core.errors import ImpromptError
from imprompt.diffusion.guidance import guide, guide_by_instruction
from imprompt.encoders.instruction import instruction_states
from imprompt.generation import published_guidance
from imprompt.generation.instructed import Words, instructed_tokens, words_of

QUICK = {"steps": 2, "guidance_scale": 3.0, "progress": False}


@pytest.fixture
def adapter(base):
    return create_adapter(
        base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64, depth=1
    )


@pytest.fixture
def photo():
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def values(images):
    return [list(image.tobytes()) for image in images]


def test_equal_strengths_are_joint_guidance():
    nothing, image, everything, full = torch.randn(4, 2, 3, 4, 4)
    torch.testing.assert_close(
        guide_by_instruction(nothing, image, everything, full, 5.0, 5.0, 5.0),
        guide(nothing, full, 5.0),
    )
    only_instruction = guide_by_instruction(nothing, image, everything, full, 0.0, 0.0, 1.0)
    torch.testing.assert_close(only_instruction, nothing + full - everything)


def test_tokens_of_each_part_are_what_training_saw(base, adapter):
    states = torch.randn(2, 5, 24)
    none = base.image_encoder.zero_hidden_states()
    words = Words(base, base.instruct_states(["a dog", "a cat", "a hat"]))
    made = instructed_tokens(adapter, states, none, "use the style", words)
    style, everything, empty = (
        base.encode_text([text]).sequence for text in ("use the style", "everything", "")
    )
    for row in range(3):
        text = words.text_states[row : row + 1]
        for part, told in ((made.full, style), (made.uninstructed, everything)):
            expected = [adapter.tokens(states[i : i + 1], told, text) for i in (0, 1)]
            torch.testing.assert_close(part[row], torch.cat(expected, 1)[0])
    alone = torch.cat([adapter.tokens(states[i : i + 1], empty, empty) for i in (0, 1)], 1)
    torch.testing.assert_close(made.image_only, alone)
    torch.testing.assert_close(made.nothing, adapter.tokens(none, empty, empty).repeat(1, 2, 1))
    untold = instructed_tokens(adapter, states, none, None, words)
    assert torch.equal(untold.uninstructed, untold.full)


@pytest.mark.parametrize("texts", [["a dog"], ["a dog", "a cat"]])
def test_each_image_may_be_told_of_a_picture_of_its_own(base, adapter, texts):
    states = torch.randn(2, 5, 24)
    none = base.image_encoder.zero_hidden_states()
    text_states = base.instruct_states(texts)
    made = instructed_tokens(
        adapter, states, none, "use the style", Words(base, text_states), is_each=True
    )
    for row in range(2):
        own = Words(base, text_states[row : row + 1] if len(texts) > 1 else text_states)
        alone = instructed_tokens(adapter, states[row : row + 1], none, "use the style", own)
        for part in ("full", "uninstructed", "image_only"):
            torch.testing.assert_close(
                getattr(made, part)[row : row + 1], getattr(alone, part), msg=part
            )
        torch.testing.assert_close(made.nothing, alone.nothing)
    with pytest.raises(ImpromptError, match="2 pictures were given .* for 3 images"):
        words = Words(base, base.instruct_states(["a", "b", "c"]))
        instructed_tokens(adapter, states, none, None, words, is_each=True)


@pytest.mark.parametrize("embedding", ["tokens", "pooled"])
def test_tokens_read_the_negative_text_as_published(base, adapter, embedding):
    adapter.metadata["instruction_embedding"] = embedding
    states, none = torch.randn(2, 5, 24), base.image_encoder.zero_hidden_states()
    texts, negatives = ["a dog", "a cat"], ["red", ""]
    words = words_of(base, texts, base.encode_text(texts), [negatives[0], None])
    assert words.negative_texts == negatives
    made = instructed_tokens(adapter, states, none, "use the style", words)
    plain = words_of(base, texts, base.encode_text(texts), [None])
    without = instructed_tokens(adapter, states, none, "use the style", plain)
    assert plain.negative_texts is None
    assert torch.equal(made.full, without.full)
    assert torch.equal(made.uninstructed, without.uninstructed)
    silent = instruction_states(base, [""], embedding)
    for row, text in enumerate(negatives):
        told, read = instruction_states(base, [text], embedding), base.instruct_states([text])
        alone = [adapter.tokens(states[i : i + 1], told, read) for i in (0, 1)]
        torch.testing.assert_close(made.image_only[row], torch.cat(alone, 1)[0])
        nothing = adapter.tokens(none, silent, read).repeat(1, 2, 1)
        torch.testing.assert_close(made.nothing[row], nothing[0])


def test_a_negative_text_for_all_or_for_each(base, adapter, photo):
    told = ImagePrompt(photo, adapter=adapter, instruction="use the style")
    apart = {"image_guidance_scale": 1.0, "instruction_guidance_scale": 6.0}

    def drawn(negative, **more):
        texts = ["a dog", "a cat"]
        return values(generate(base, texts, told, negative_prompt=negative, **QUICK, **more))

    for more in ({}, apart):
        none, red = drawn(None, **more), drawn("red", **more)
        assert none == drawn("", **more) and red != none
        for given, expected in ((["red", "red"], red), (["red", None], [red[0], none[1]])):
            pairs = zip(drawn(given, **more), expected, strict=True)
            assert max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)) <= 1


def test_an_instruction_changes_the_image_and_the_text_its_tokens(base, adapter, photo):
    def drawn(instruction, **more):
        prompt = ImagePrompt(photo, adapter=adapter, instruction=instruction)
        return values(generate(base, ["a dog", "a cat"], prompt, **QUICK, **more))

    style = drawn("use the style")
    assert style == drawn("use the style") and style != drawn("a dog")
    assert drawn(None) == drawn("use everything")
    apart = drawn("use the style", image_guidance_scale=1.0, instruction_guidance_scale=6.0)
    assert apart != style
    same = drawn("use the style", image_guidance_scale=3.0, instruction_guidance_scale=3.0)
    differences = [
        abs(a - b) for x, y in zip(same, style, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert max(differences) <= 1
    one = generate(
        base, "a dog", ImagePrompt(photo, adapter=adapter, instruction="use the style"), **QUICK
    )
    assert values(one)[0] == style[0]


def test_other_adapters_cannot_be_told(base, photo):
    plus = create_adapter(base.unet, "plus", feature_dim=24, num_tokens=3, resampler_dim=64)
    with pytest.raises(ImpromptError, match="only Instruct adapters"):
        ImagePrompt(photo, adapter=plus, instruction="use the style")
    for prompts in (ImagePrompt(photo, adapter=plus), ()):
        with pytest.raises(ImpromptError, match="no image prompt of one"):
            generate(base, "a", prompts, instruction_guidance_scale=9.0, **QUICK)


def test_instructed_prompts_may_all_be_silent(base, adapter, photo):
    silent = ImagePrompt(photo, adapter=adapter, instruction="use the style", scale=0)
    apart = generate(base, "a", silent, instruction_guidance_scale=9.0, **QUICK)
    assert values(apart) == values(generate(base, "a", **QUICK))


def test_the_authors_modes():
    joint = published_guidance("Use the STYLE")
    assert joint.instruction_scale is None and joint.added_scale == 0
    layout = published_guidance("take the composition")
    assert layout.instruction_scale == 6.0 and layout.image_scale == 1.0
    assert layout.added_scale == -0.2
    assert published_guidance("use the duck").added_scale == 0


def test_on_the_command_line(tmp_path, monkeypatch):
    from imprompt.cli import generate as verb
    from imprompt.cli.main import create_parser

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "photo.png")
    seen = {}

    def spy(base, prompt, image_prompts, **settings):
        seen.update(prompts=image_prompts, **settings)
        return [Image.new("RGB", (8, 8))]

    from imprompt.bases import load_base

    monkeypatch.setattr("imprompt.generation.generate", spy)
    base = load_base("diorama")
    adapter = create_adapter(base.unet, "instruct", feature_dim=160, resampler_dim=64, depth=1)
    monkeypatch.setattr(verb, "_adapter", lambda arguments: adapter)

    def run(*more):
        command = ["generate", "a dog", "--image", str(tmp_path / "photo.png"), "--overwrite"]
        arguments = create_parser().parse_args(
            [*command, "--output", str(tmp_path / "o.png"), *more]
        )
        arguments.run(arguments)

    run("--instruction", "use the style", "--instruction-guidance-scale", "4")
    assert seen["prompts"][0].instruction == "use the style"
    assert seen["instruction_guidance_scale"] == 4.0
    run("--instruction", "use the layout", "--published-guidance")
    assert seen["guidance_scale"] == 6.0 and seen["image_guidance_scale"] == 1.0
    with pytest.raises(ImpromptError, match="add --instruction"):
        run("--published-guidance")
    with pytest.raises(ImpromptError, match="one for all"):
        run("--instruction", "a", "--instruction", "b")
