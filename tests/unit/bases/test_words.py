"""Texts become the token ids that diffusers' pipelines make of them."""

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from tiny_base import (
    SECOND_TEXT_DIM,
    TEXT_DIM,
    TEXT_LENGTH,
    write_tiny_base,
    write_tiny_xl_base,
)

from imprompt.bases import load_base
from imprompt.bases.extensions import add_textual_inversion, pipeline_of
from imprompt.core.errors import ImpromptError

TEXTS = ["", "a red cat", "red, red cat and more than is ever read", "a <|endoftext|> cat"]
KINDS = {"sd": write_tiny_base, "xl": write_tiny_xl_base}


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    return load_base(KINDS[request.param](tmp_path / "tiny"))


def theirs(base, texts):
    """As diffusers' pipelines tokenize."""
    tokenizers = [base.tokenizer, *([base.tokenizer_2] if hasattr(base, "tokenizer_2") else [])]
    ids = []
    for tokenizer in tokenizers:
        told = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
        ids.append(
            tokenizer(
                told,
                padding="max_length",
                max_length=TEXT_LENGTH,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        )
    return torch.cat(ids, dim=1)


def test_the_ids_are_those_of_the_pipelines(base):
    assert torch.equal(base.tokenize(TEXTS), theirs(base, TEXTS))


def test_a_word_of_several_vectors_is_read_with_all_of_them(base):
    vectors = torch.randn(3, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    pipeline_of(base).load_textual_inversion({"<thing>": vectors})
    pipeline_of(base).load_textual_inversion({"<one>": vectors[:1]})
    texts = ["a <thing>", "<thing>cat,<one> <thing>", "a cat", "red red red red red <thing> cat"]
    assert torch.equal(base.tokenize(texts), theirs(base, texts))
    first = base.tokenizer.convert_tokens_to_ids("<thing>")
    assert base.tokenize(["a <thing>"])[0, 2:5].tolist() == [first, first + 1, first + 2]


def test_a_word_with_capitals_is_read_with_all_vectors_too(base):
    pipeline_of(base).load_textual_inversion({"EasyThing": torch.ones(2, TEXT_DIM)})
    first = base.tokenizer.convert_tokens_to_ids("EasyThing")
    assert base.tokenize(["a EasyThing"])[0, 2:4].tolist() == [first, first + 1]


def embeddings(tokenizer, text_encoder, words):
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    return text_encoder.get_input_embeddings().weight[ids]


def test_vectors_without_a_word_teach_the_name_of_their_file(base, tmp_path):
    vectors = torch.randn(2, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, tmp_path / "EasyThing.safetensors")
    add_textual_inversion(base, tmp_path / "EasyThing.safetensors")
    add_textual_inversion(base, tmp_path / "EasyThing.safetensors", token="<other>")
    for word in ("EasyThing", "<other>"):
        learned = embeddings(base.tokenizer, base.text_encoder, [word, f"{word}_1"])
        torch.testing.assert_close(learned, vectors)
    assert "emb_params" not in base.tokenizer.get_vocab()


def test_a_word_for_both_encoders_of_xl(tmp_path):
    base = load_base(write_tiny_xl_base(tmp_path / "xl"))
    widths = {"clip_l": TEXT_DIM, "clip_g": SECOND_TEXT_DIM}
    vectors = {name: torch.randn(2, width) for name, width in widths.items()}
    save_file(vectors, tmp_path / "thing.safetensors")
    wrong = {"clip_l": vectors["clip_l"], "clip_g": vectors["clip_l"].clone()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ImpromptError, match="its clip_g is 16 wide, .* words 24"):
        add_textual_inversion(base, tmp_path / "wrong.safetensors", token="thing")
    add_textual_inversion(base, tmp_path / "thing.safetensors")
    words = ["thing", "thing_1"]
    first = embeddings(base.tokenizer, base.text_encoder, words)
    second = embeddings(base.tokenizer_2, base.text_encoder_2, words)
    torch.testing.assert_close({"clip_l": first, "clip_g": second}, vectors)
    assert torch.equal(base.tokenize(["a thing cat"]), theirs(base, ["a thing cat"]))
    other = load_base(write_tiny_base(tmp_path / "sd"))
    with pytest.raises(ImpromptError, match="made for the two text encoders"):
        add_textual_inversion(other, tmp_path / "thing.safetensors")


def test_a_file_of_several_tensors_is_told_in_a_line(base, tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ImpromptError, match=r"it holds a, b, … instead of one word\.$"):
        add_textual_inversion(base, tmp_path / "two.safetensors")
